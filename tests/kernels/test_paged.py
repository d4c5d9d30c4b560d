"""Key blocks as pages of xformers' paged cache, where no operator is needed."""

from __future__ import annotations

import pytest
import torch

from sparsiattn.kernels import Triton, XFormers, paged
from tests.support.flex_calls import flex_call


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(("side", "share"), [(32, 4), (64, 10)])
def test_auto_prefers_triton(side: int, share: int, images: int) -> None:
    """It reads keys once for a tile, and not for every 16 queries."""
    options = {"k": side * side // share, "tile": (8, 8), "block": (4, 4), "shared": True}
    inputs, pattern = flex_call((side, side), dtype=torch.bfloat16, **options)
    q, k, v = (x[:1].expand(images, -1, -1, -1) for x in (inputs.q, inputs.k, inputs.v))
    inputs = inputs.replace(q=q, k=k, v=v)
    assert 0 < XFormers().speed(inputs, pattern) < Triton().speed(inputs, pattern)


class Mask:
    """In the place of xformers' class."""

    @classmethod
    def from_seqlens(cls, *args: object, **options: object) -> Mask:
        return cls()


def test_a_mask_is_cached_when_its_values_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may use it on another stream."""
    waits: list[torch.device] = []
    monkeypatch.setattr(paged.geometry, "wait_for_values", waits.append)
    first, second = (paged._lengths(Mask, 6, 4, 9, 3, 16, torch.device("cpu")) for _ in range(2))
    assert first is second
    assert waits == [torch.device("cpu")]
