"""Linear layers and attention that stay whole in a dry run tell the same as their parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from sparsiattn.attention.layout import HostCall
from sparsiattn.patching.discovery import probe
from sparsiattn.patching.discovery.pixel_numbers import numbers_of
from sparsiattn.patching.discovery.pixel_tracking import PixelNumbers, tracking_places
from sparsiattn.patching.discovery.whole_operators import WholeLinearTrial, whole_attention
from sparsiattn.patching.flop_counter import MacTally
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.runtime.lifting import Trial
from tests.support import zoo

MODELS = {**{name: (make, None) for name, make in zoo.FAMILIES.items()}, **zoo.HIERARCHIES}


def told(of: ModelSurvey) -> object:
    """What the survey says of every call, with the numbers of pixels as lists."""

    def numbers(x: Tensor | None) -> object:
        return None if x is None else x.tolist()

    calls = [
        (replace(call, module=None, parents=()), numbers(call.q_places), numbers(call.k_places))
        for call in of.calls
    ]
    return calls, of.skipped, of.returned, of.entrances, of.macs, of.sites


@pytest.mark.parametrize("name", zoo.slow_but(["vit", "swin", "beit"], *MODELS))
def test_a_survey_is_that_of_the_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, side = MODELS[name]
    model, example = zoo.drawn(make), None if side is None else (1, 3, side, side)
    whole = told(survey(model, example))
    monkeypatch.setattr(probe, "WholeLinearTrial", Trial)
    monkeypatch.setattr(probe, "whole_attention", HostCall.dense)
    assert whole == told(survey(model, example))


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def tokens() -> Tensor:
    """``[1, 1, 16, 3]``, every pixel a token."""
    image = meta(1, 3, 4, 4)
    PixelNumbers(image)
    return image.flatten(2).mT.unsqueeze(1)


CALLS = {
    "tokens": lambda: (tokens(), tokens(), tokens()),
    "heads": lambda: (tokens().expand(1, 2, 16, 3),) * 3,
    "one query": lambda: (meta(1, 1, 1, 3), tokens(), tokens()),
    "one query of an image": lambda: (tokens()[:, :, 3:4], tokens(), tokens()),
    "channels": lambda: (tokens().mT, tokens().mT, tokens().mT),
    "constant keys": lambda: (tokens(), meta(1, 1, 5, 3), meta(1, 1, 5, 3)),
    "constants": lambda: (meta(1, 1, 5, 3), meta(1, 1, 7, 3), meta(1, 1, 7, 3)),
    "mean": lambda: (tokens().mean(-2, keepdim=True), tokens(), tokens()),
    "wider values": lambda: (tokens(), tokens(), tokens().repeat(1, 1, 1, 2)),
    "broadcast": lambda: (tokens().expand(2, 3, 16, 3), tokens(), tokens()),
    "mask": lambda: (tokens(), tokens(), tokens(), meta(16, 16)),
    "mask of an image": lambda: (
        *(meta(1, 1, 16, 3), meta(1, 1, 5, 3), meta(1, 1, 5, 3)),
        tokens()[..., :1].expand(1, 1, 16, 5),
    ),
}  # fmt: skip


TRACED = CALLS.keys() - {"constants", "mean"}
"""Those whose results come from known pixels."""


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_is_its_two_products(case: str, scale: float | None) -> None:
    told = []
    for attend in (whole_attention, HostCall.dense):
        tally = MacTally()
        with torch.no_grad(), tracking_places(tally):
            out = attend(HostCall(*CALLS[case](), scale=scale))
        told.append((out.shape, numbers_of(out).tolist(), tally.macs))
    assert told[0] == told[1]
    assert bool((numbers_of(out) >= 0).any()) == (case in TRACED)


def test_grouped_heads_are_taken_apart() -> None:
    with torch.no_grad(), tracking_places():
        q, kv = tokens().expand(1, 4, 16, 3), tokens().expand(1, 2, 16, 3)
        out = whole_attention(HostCall(q, kv, kv, gqa=True))
    assert torch.equal(numbers_of(out)[0, 3, :, 0], torch.arange(16, dtype=torch.int32))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (tokens, lambda: meta(5, 3)),
        (lambda: tokens().mT, lambda: meta(5, 16)),
        (lambda: meta(4, 3), lambda: tokens()[0, 0]),
        (lambda: tokens()[0, 0, 0], lambda: meta(5, 3)),
        (lambda: tokens().mean(-2, keepdim=True), lambda: meta(5, 3)),
    ],
    ids=["tokens", "over tokens", "tokens as weights", "a vector", "mean"],
)  # fmt: skip
def test_a_linear_layer_is_its_product(x: object, weight: object) -> None:
    told = []
    for mode in (WholeLinearTrial(), Trial()):
        tally = MacTally()
        with torch.no_grad(), tracking_places(tally), mode:
            out = F.linear(x(), weight())  # type: ignore[operator]
        told.append((out.shape, numbers_of(out).tolist(), tally.macs))
    assert told[0] == told[1]


class Subclass(Tensor):
    """A tensor that knows how to be multiplied, and not what a linear layer is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Subclass:
        made: Subclass = Tensor._make_wrapper_subclass(cls, inner.shape, device=inner.device)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (
            torch.ops.aten.linear, torch.ops.aten.scaled_dot_product_attention,
        )  # fmt: skip
        plain = tree_map(lambda x: x.inner if isinstance(x, cls) else x, args)
        return func(*plain, **(kwargs or {}))


def test_subclasses_get_the_parts() -> None:
    weight = Subclass(meta(5, 3))
    with torch.no_grad(), tracking_places(), WholeLinearTrial():
        assert F.linear(meta(4, 3), weight).shape == (4, 5)
    with torch.no_grad(), tracking_places():
        keys = Subclass(meta(1, 1, 7, 3))
        out = whole_attention(HostCall(meta(1, 1, 4, 3), keys, meta(1, 1, 7, 3)))
    assert out.shape == (1, 1, 4, 3)


def test_a_block_is_seen_in_a_few_operators() -> None:
    """A block of a ViT: four linear layers, attention, two norms, GELU, two sums, moves."""
    seen = []
    model = zoo.build("vit")
    original = probe._Recorder.note_operator

    def note(self: probe._Recorder, func: object, args: object, *rest: object) -> None:
        seen.append(func)
        original(self, func, args, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe._Recorder, "note_operator", note)
        survey(model, None)
    blocks = len(model.blocks)  # type: ignore[arg-type]
    assert len(seen) <= 18 * blocks + 36  # 44 a block in parts
