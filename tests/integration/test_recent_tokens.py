"""Hosts whose towers stand beside decoders, or take frames and tiles: fewer tokens, against towers
driven by hand."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsiattn
from tests.support import census_recent, hosts_recent, matrix
from tests.support.mlps_by_hand import Spared
from tests.support.tokens_by_hand import Drop, Merge, Shortened

pytestmark = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not here")


def _subject(name: str) -> matrix.Subject:
    try:
        hosts = hosts_recent.HOSTS if name in hosts_recent.HOSTS else dict(census_recent.heads())
        return census_recent.subject(name, hosts[name])
    except (AttributeError, ImportError) as error:
        pytest.skip(f"this version of transformers lacks it: {error}")


def _part(subject: matrix.Subject, path: str) -> list[Any]:
    parent, _, name = path.rpartition(".")
    module = subject.model.get_submodule(parent)
    if not hasattr(module, name):  # in transformers before 5.9
        module, name = module.encoder, name.removesuffix("s")  # type: ignore[assignment]
    return list(getattr(module, name))


def _patched(subject: matrix.Subject, strategy: str, **options: Any) -> tuple[Tensor, str]:
    """The output of a patched model for two images, and the report."""
    example = subject.example()
    with sparsiattn.patch(subject.model, strategy, input=example, **options) as patch:
        return subject.forward(), str(patch.report())


@dataclass(frozen=True)
class Towers:
    """Where the blocks of each tower are. prefix: special tokens before the patches, of which
    classes are class tokens; whole: paths of blocks that keep every token."""

    paths: tuple[str, ...]
    prefix: int = 1
    classes: int = 1
    whole: tuple[str, ...] = ()


ENCODER = "depth_pro.encoder.{}_encoder.model.encoder.layer"
SHORT = {
    "depth_pro": Towers((ENCODER.format("patch"), ENCODER.format("image"))),
    "deimv2": Towers(
        ("model.conv_encoder.backbone.model.layer",), 3,
        whole=("model.encoder.aifi.0", "model.decoder.layers.0", "model.decoder.layers.1"),
    ),
    "pe_video": Towers(
        ("embedder.vision_model.timm_model.blocks",), whole=("layers.0", "layers.1")
    ),
    "gemma4": Towers(("encoder.layers",), 0, 0),
    "vit_mae (masked)": Towers(("vit.layers",), whole=("decoder.decoder_layers.0",)),
    "videomae: VideoMAEForPreTraining": Towers(
        ("videomae.encoder.layer",), 0, 0,
        whole=tuple(f"decoder.decoder_layers.{i}" for i in range(4)),
    ),
    "clip: CLIPModel": Towers(
        ("vision_model.encoder.layers",), whole=("text_model.encoder.layers.0",)
    ),
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {"token_drop": {"keep": 0.5}, "token_merge": {"r": 2}}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SHORT)
def test_towers_are_shortened_and_decoders_are_not(name: str, strategy: str) -> None:
    subject, towers, options = _subject(name), SHORT[name], STRATEGIES[strategy]
    reduce: Any = Drop(0.5, towers.classes) if strategy == "token_drop" else Merge(2)
    layers = list(range(len(_part(subject, towers.paths[0]))))
    out, report = _patched(subject, strategy, layers=layers, **options)
    with ExitStack() as stack:
        for path in towers.paths:
            blocks = _part(subject, path)
            oracle = Shortened(subject.model, blocks, towers.prefix, reduce, every=True)
            stack.enter_context(oracle.driven(whole=True))
            stack.enter_context(oracle.short)
        expected = subject.forward()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    kept = [line.split()[0] for line in report.splitlines() if "keeps every token" in line]
    assert kept == list(towers.whole)


SWIN = "model.pixel_level_module.encoder.swin.encoder.layers.{}.blocks"
SWINS = tuple(SWIN.format(i) for i in range(4))


@dataclass(frozen=True)
class Stages:
    """Where the blocks of each stage are, and the module that takes the sum before their MLP.
    reducing: numbers of blocks; prefix: special tokens of each stage; last: blocks at the end that
    are a stage of their own."""

    paths: tuple[str, ...]
    norm: str
    reducing: tuple[int, ...]
    prefix: tuple[int, ...]
    last: int = 0


SPARED = {
    "mask2former (swin)": Stages(SWINS, "layernorm_after", (0, 2), (0,) * 4),
    "oneformer (swin)": Stages(SWINS, "layernorm_after", (1, 2, 3), (0,) * 4),
    "rf_detr": Stages(("model.backbone.backbone.encoder.layer",), "norm2", (1, 2), (1,)),
    "lw_detr": Stages(("model.backbone.backbone.encoder.layer",), "layernorm_after", (1, 2), (0,)),
    "mobilevit: MobileViTModel": Stages(
        tuple(f"encoder.layer.{i}.transformer.layer" for i in (2, 3, 4)), "layernorm_after",
        (1, 2, 4), (0, 0, 0),
    ),
    "videomt": Stages(("layers",), "norm2", (1, 3), (5, 10), last=1),
}  # fmt: skip


@pytest.mark.parametrize("name", SPARED)
def test_dropped_tokens_of_a_tower_skip_its_mlps(name: str) -> None:
    subject, stages = _subject(name), SPARED[name]
    parts = [_part(subject, path) for path in stages.paths]
    if stages.last:
        parts = [parts[0][: -stages.last], parts[0][-stages.last :]]
    out, _ = _patched(subject, "token_drop", score="norm", keep=0.5, layers=list(stages.reducing))
    with Spared(parts, stages.norm, stages.reducing, 0.5, stages.prefix).driven():
        expected = subject.forward()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
