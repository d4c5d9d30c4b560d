"""Every vision encoder of transformers, and torchvision's windows: what is found in them, and that
patching changes what it should and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import InvalidOption, NothingToPatch
from tests.support import hosts_structure, hosts_transformers

pytest.importorskip("transformers")
pytest.importorskip("torchvision")

ENTRIES = {name: (make, shape) for name, make, shape in hosts_transformers.entries()}
LEFT = {
    "x_clip": "message_attn",
    "siglip": "head.attention",
    "aimv2": "head",
    "groupvit": "downsample.assign",
    "vjepa2": "predictor.layer.0.attention",
}
"""Attention that is left alone, and named."""
WRITTEN = ["donut-swin", "swinv2", "vitdet", "pvt", "hiera", "timesformer"]
"""Hand-written attention that returns its weights when asked."""


SLOW = {"detr", "perceiver"}


def drawn(model: nn.Module) -> nn.Module:
    """In eval mode, with parameters that start at next to nothing drawn again."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.02 if parameter.dim() > 1 else 0.1)
    return model.eval()


def take_statistics(model: nn.Module, images: Tensor) -> None:
    """Batch normalisation by these images: by statistics never taken, LeViT's and MobileViT's
    signals die out."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model(images)
    model.eval()


def marked(names: Any) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


def built(name: str) -> tuple[nn.Module, dict[str, Any], Any]:
    """The model, what to call it with, and the shape of one image."""
    make, shape = ENTRIES[name]
    torch.manual_seed(0)
    model = drawn(make())
    assert shape is not None
    images = torch.randn(2, *shape[1:])
    take_statistics(model, images)
    takes = hosts_transformers.INPUTS.get(name)
    if takes is not None:
        return model, takes(images), shape
    main = {"vjepa2": "pixel_values_videos", "perceiver": "inputs"}.get(name, "pixel_values")
    inputs: dict[str, Any] = {main: images}
    if name == "vit_mae":
        inputs["noise"] = torch.rand(2, 64)  # else every call would shuffle anew
    return model, inputs, shape


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = list(output.values()) if isinstance(output, dict) else output
    return (
        [t for item in values for t in tensors(item)] if isinstance(values, (list, tuple)) else []
    )


def error(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def rows(live: sparsiattn.Patch) -> list[Any]:
    return [hosts_structure.row_of(site) for site in live.sites]


def expected(shapes: list[hosts_structure.Shape]) -> list[Any]:
    return [shape.row() for shape in shapes for _ in range(shape.times)]


def test_every_model_has_an_expectation() -> None:
    told = {*hosts_structure.STRUCTURE, *hosts_structure.NONE}
    assert told == set(ENTRIES)


@pytest.mark.parametrize("name", marked(hosts_structure.STRUCTURE))
def test_transformers(name: str) -> None:
    model, inputs, shape = built(name)
    size = {"input": shape} if name in hosts_structure.SILENT else {}
    with torch.no_grad():
        dense = tensors(model(**inputs))
        with sparsiattn.patch(model, "topk", k=1.0, **size) as live:
            assert live.backbone == "huggingface"
            assert live.input_shape == shape
            assert rows(live) == expected(hosts_structure.STRUCTURE[name])
            assert name not in LEFT or any(LEFT[name] in module for module, _ in live.skipped)
            assert error(tensors(model(**inputs)), dense) <= 1e-5
        with sparsiattn.patch(model, "topk", k=0.25, **size):
            assert error(tensors(model(**inputs)), dense) > 1e-5
        assert all(map(torch.equal, tensors(model(**inputs)), dense))


@pytest.mark.parametrize("name", hosts_structure.NONE)
def test_without_attention_between_tokens(name: str) -> None:
    model, _, shape = built(name)
    with pytest.raises(NothingToPatch, match=hosts_structure.NONE[name]):
        sparsiattn.patch(model, "topk", input=shape)


@pytest.mark.parametrize("name", hosts_structure.TORCHVISION)
@pytest.mark.parametrize("strategy", ["topk", "connectivity", "local"])
def test_torchvision(name: str, strategy: str) -> None:
    make, shapes = hosts_structure.TORCHVISION[name]
    torch.manual_seed(0)
    model, x = drawn(make()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, strategy, k=1.0, input=x) as live:
            assert live.backbone == "generic"
            assert rows(live) == expected(shapes)
            assert error([model(x)], [dense]) <= 1e-5
        with sparsiattn.patch(model, strategy, k=0.25, input=x):
            assert error([model(x)], [dense]) > 1e-6
        assert torch.equal(model(x), dense)


def _window_model(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in hosts_structure.TORCHVISION:
        return drawn(hosts_structure.TORCHVISION[name][0]()), torch.randn(2, 3, 64, 64)
    model, inputs, _ = built(name.removeprefix("hf_"))
    return model, inputs["pixel_values"]


@pytest.mark.parametrize("name", ["swin", "swin_v2", "hf_swin", "hf_swinv2"])
def test_swins_skip_the_mlp(name: str) -> None:
    model, x = _window_model(name)
    options: dict[str, Any] = {"score": "norm", "layers": [1, 2], "input": x}
    with torch.no_grad():
        dense = tensors(model(x))
        with sparsiattn.patch(model, "token_drop", keep=1.0, **options):
            assert error(tensors(model(x)), dense) <= 1e-5
        with sparsiattn.patch(model, "token_drop", keep=0.5, **options) as live:
            report = live.report()
            assert all("skip only the MLP" in line for line in report.reductions)
            assert report.macs is not None
            assert report.macs < report.macs_dense
            assert error(tensors(model(x)), dense) > 1e-5
        assert all(map(torch.equal, tensors(model(x)), dense))


def test_blocks_without_an_mlp_of_their_own_are_refused() -> None:
    model = drawn(hosts_structure.TORCHVISION["maxvit"][0]())
    with pytest.raises(InvalidOption, match="no separate MLP branch"):
        sparsiattn.patch(model, "token_drop", score="norm", input=(1, 3, 64, 64))


@pytest.mark.parametrize("name", WRITTEN)
def test_weights_that_were_asked_for_are_none(name: str) -> None:
    """As with transformers' own fused attention; the output is that without the question."""
    model, inputs, _ = built(name)
    with torch.no_grad():
        kept = model(**inputs, output_attentions=True).attentions
        assert any(isinstance(weights, Tensor) for weights in kept)
        with sparsiattn.patch(model, "topk", k=0.25) as live:
            asked = model(**inputs, output_attentions=True)
            assert len(asked.attentions) == len(kept)
            assert all(weights is None for weights in asked.attentions)
            assert error(tensors(asked)[:1], tensors(model(**inputs))[:1]) == 0
            with live.disabled():
                again = model(**inputs, output_attentions=True).attentions
        assert all(map(torch.equal, again, kept))


@pytest.mark.parametrize("strategy", ["topk", "connectivity"])
def test_padded_patches_are_never_keys(strategy: str) -> None:
    """A dry run has no mask; the host's own, given later, is respected all the same."""
    model, inputs, _ = built("idefics2")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = inputs["pixel_values"]
    other = images.clone()
    other[1, :, :, 16:] = 9.0
    seen = torch.ones(2, 8, 8, dtype=torch.bool)
    seen[1, :, 4:] = False

    def at_seen(pixels: Tensor) -> Tensor:
        output = model(pixels, patch_attention_mask=seen).last_hidden_state
        return output[seen.flatten(1)]  # type: ignore[no-any-return]

    with torch.no_grad():
        dense = at_seen(images)
        with sparsiattn.patch(model, strategy, k=0.5):
            sparse = at_seen(images)
            torch.testing.assert_close(at_seen(other), sparse)
        assert error([sparse], [dense]) > 1e-5


@pytest.mark.parametrize("strategy", ["connectivity", "local", "random"])
@pytest.mark.parametrize("name", ["timesformer", "vivit", "vjepa2", "pvt", "pixio"])
def test_other_strategies(name: str, strategy: str) -> None:
    """Where class tokens and frames lie in an unusual way."""
    model, inputs, _ = built(name)
    with torch.no_grad():
        dense = tensors(model(**inputs))
        with sparsiattn.patch(model, strategy, k=1.0):
            assert error(tensors(model(**inputs)), dense) <= 1e-5
        # without summaries, which of four keys are the keys themselves
        with sparsiattn.patch(model, strategy, k=0.25, background=None):
            assert error(tensors(model(**inputs)), dense) > 1e-6
        assert all(map(torch.equal, tensors(model(**inputs)), dense))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "swin_v2", "maxvit", "hf_swin", "hf_swinv2"])
def test_windows_compile_to_one_graph(name: str) -> None:
    model, x = _window_model(name)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(tensors(compiled(x)), tensors(model(x)))
        with sparsiattn.patch(model, "topk", k=0.25, input=x):
            sparse = tensors(model(x))
            torch.testing.assert_close(tensors(compiled(x)), sparse)
    torch.compiler.reset()


def test_eager_hosts_that_say_nothing_of_causality_stay_undirected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Chinese-CLIP's in transformers 5.4: "sdpa" takes silence for "causal"."""
    model, inputs, _ = built("clip (vision)")
    model.set_attn_implementation("eager")
    attentions = [m for m in model.modules() if "is_causal" in vars(m)]
    for attention in attentions:
        del attention.is_causal
    with torch.no_grad():
        dense = tensors(model(**inputs))
        with sparsiattn.patch(model, "topk", k=1.0) as live:
            assert error(tensors(model(**inputs)), dense) <= 1e-5
            with live.disabled():
                assert all(map(torch.equal, tensors(model(**inputs)), dense))
    assert attentions
    assert not any(hasattr(m, "is_causal") for m in attentions)
