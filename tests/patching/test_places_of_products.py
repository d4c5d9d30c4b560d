"""Which places a matrix product hands on: those of tokens, and none where they are not known."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.patching.discovery.pixel_numbers import UNKNOWN, places_in
from sparsiattn.patching.discovery.pixel_tracking import PixelNumbers, tracking_places


def image() -> Tensor:
    return torch.empty(1, 1, 4, 4, device="meta")


def tokens(x: Tensor) -> Tensor:
    """``[1, 16, 1]``, every pixel a token."""
    return x.flatten(2).mT


def places(x: Tensor) -> list[int]:
    numbers = places_in(x)
    assert numbers is not None
    return numbers[0, :, 0].tolist()


def test_a_product_has_the_places_of_its_rows() -> None:
    x = image()
    PixelNumbers(x)
    with tracking_places():
        out = tokens(x) @ torch.empty(1, 5, device="meta")
    assert places(out) == list(range(16))


def test_a_constant_times_tokens_has_those_of_its_columns() -> None:
    x = image()
    PixelNumbers(x)
    with tracking_places():
        out = torch.empty(1, 5, 1, device="meta") @ tokens(x).mT
    numbers = places_in(out)
    assert numbers is not None
    assert numbers[0, 0].tolist() == list(range(16))


def test_a_row_that_is_in_no_one_place_hands_on_none() -> None:
    """Attention over channels: rows are channels, means over all tokens."""
    x = image()
    PixelNumbers(x)
    with tracking_places():
        channel = tokens(x).mT.mean(-1, keepdim=True)
        known, out = places_in(channel), channel @ tokens(x).mT
    assert known is not None
    assert known.unique().tolist() == [UNKNOWN]
    numbers = places_in(out)
    assert numbers is not None
    assert numbers.unique().tolist() == [UNKNOWN]
