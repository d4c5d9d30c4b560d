"""transformers' vision encoders against attention by hand, on the true places of their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from tests.support import hosts_transformers, zoo
from tests.support.oracle_hosts import RULES, Host, disagreements, unrolled
from tests.support.tokens_by_hand import Drop, Shortened

pytestmark = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not here")

PLAIN = ((8, 8),)
STAGES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
HOSTS: dict[str, Host] = {
    "vit": Host(PLAIN, 1),
    "deit": Host(PLAIN, 2),
    "vit_mae": Host(PLAIN, 1),
    "dinov2": Host(PLAIN, 1),
    "dinov2_with_registers": Host(PLAIN, 4),
    "dinov3_vit": Host(PLAIN, 4),
    "ijepa": Host(PLAIN),
    "clip": Host(PLAIN, 1),
    "siglip": Host(PLAIN),
    "siglip2": Host(PLAIN),
    "aimv2": Host(PLAIN),
    "pixio": Host(PLAIN, 8),
    "tipsv2": Host(PLAIN, 2),
    "blip": Host(PLAIN, 1),
    "internvl": Host(PLAIN, 1),
    "owlvit": Host(PLAIN, 1),
    "idefics2": Host(PLAIN),
    "pixtral": Host(((8, 8), (16, 8)), images=1),
    "llama4": Host(PLAIN, suffix=1),
    "beit": Host(PLAIN, 1),
    "data2vec-vision": Host(PLAIN, 1),
    "yolos": Host(PLAIN, 1, suffix=5),
    "vitpose_backbone": Host(((4, 4),)),
    "vitdet": Host(((4, 4), (8, 8))),
    "dpt": Host(PLAIN, 1),
    "sam": Host(STAGES),
    "sam2": Host((*STAGES, (14, 14), (7, 7))),
    "swin": Host(((4, 4),)),
    "swinv2": Host(((4, 4),)),
    "swin2sr": Host(((4, 4),)),
    "segformer": Host(STAGES),
    "glpn": Host(STAGES),
    "pvt": Host(STAGES, 1, prefixed=".block.3."),
    "pvt_v2": Host(STAGES),
    "hiera": Host(STAGES, order=unrolled),
    "levit": Host(STAGES),
    "mobilevit": Host(STAGES),
}
# one of each structure; the others are made of the same layers
QUICK = {
    "dinov2_with_registers", "vit_mae", "siglip2", "pixtral", "llama4", "yolos", "vitdet", "sam2",
    "swin2sr", "pvt", "hiera", "mobilevit", "data2vec-vision",
}  # fmt: skip
UNPLACED = ("vit_mae", "hiera")
"""Hosts that shuffle, pack or unroll their tokens, so that nobody knows places."""


def _cells() -> Iterator[Any]:
    for name in HOSTS:
        for strategy in RULES:
            marks = [] if name in QUICK else [pytest.mark.census]
            if name not in UNPLACED or strategy == "topk":
                yield pytest.param(name, strategy, id=f"{name}-{strategy}", marks=marks)


def _model(name: str, **changes: Any) -> tuple[nn.Module, Tensor]:
    model_class, config, options, *_ = hosts_transformers.CASES[name]
    options = {**options, **changes}
    model = zoo.drawn(hosts_transformers.builder(model_class, config, options))
    shape = next(shape for case, _, shape in hosts_transformers.entries() if case == name)
    return model, torch.randn(HOSTS[name].images, *(shape or (1, 3, 32, 32))[1:])


@pytest.mark.parametrize(("name", "strategy"), [*_cells()])
@torch.no_grad()
def test_attention_keeps_what_its_rule_says(name: str, strategy: str) -> None:
    model, images = _model(name)
    inputs = hosts_transformers.INPUTS.get(name)

    def run() -> Any:
        torch.manual_seed(4)  # masked autoencoders draw what they leave out
        return model(images) if inputs is None else model(**inputs(images))

    assert disagreements(model, run, HOSTS[name], strategy, tuple(images.shape)) == []


@pytest.mark.parametrize("name", UNPLACED)
def test_what_has_no_places_is_refused_or_said(name: str) -> None:
    model, images = _model(name)
    with pytest.raises(sparsiattn.SparsiattnError, match="where tokens are in the image"):
        sparsiattn.patch(model, "local", input=tuple(images.shape))
    with sparsiattn.patch(model, "connectivity", tile=(2, 2), input=tuple(images.shape)) as patch:
        report = patch.report()
    assert "not in raster order" in str(report)
    assert {row.tile for row in report.sites} == {1}


# class tokens among the prefix
CLASSES = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1, "beit": 1, "yolos": 1}
# the embedding of every position, added again between blocks, takes no shorter sequence
UNCHANGED = {"yolos": {"use_mid_position_embeddings": False}}


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_only_patches_are_dropped(name: str) -> None:
    """By the attention of class tokens; others before and behind the patches stay."""
    (model, images), host = _model(name, **UNCHANGED.get(name, {})), HOSTS[name]
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    drop, whole = Drop(0.5, CLASSES[name]), host.suffix > 0
    oracle = Shortened(model, list(blocks), host.prefix, drop, host.suffix)
    expected = torch.cat([_read(out, host) for out in oracle.outputs(images, whole)])
    with sparsiattn.patch(model, "token_drop", keep=0.5, input=tuple(images.shape)):
        out = _read(model(images), host)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def _read(out: Any, host: Host) -> Tensor:
    """Logits, or the tokens before and behind the patches."""
    if "logits" in out:
        return out.logits  # type: ignore[no-any-return]
    x = out.last_hidden_state
    return torch.cat([x[:, : host.prefix], x[:, x.shape[1] - host.suffix :]], dim=1)
