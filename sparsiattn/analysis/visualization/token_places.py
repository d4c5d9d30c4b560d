"""Where the tokens of an attention call are in the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention import AttentionInputs, Grid, TokenState

_PLAIN_WINDOWS = ("timm.models.vision_transformer_sam",)
"""Modules whose blocks cut windows in raster order and never shift them."""


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Tokens by patch. Tokens are numbered window after window, prefix tokens included.

    Attributes:
        place: ``[rows, columns]``, the query token that holds each patch, -1 where it is gone;
            None where that is not known.
        key_place: The same for keys.
        why: Why they are not known.
        fused: Tokens that hold the sum of dropped ones, which have no place.
    """

    place: Tensor | None = None
    key_place: Tensor | None = None
    why: str = ""
    fused: tuple[int, ...] = ()

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of patches; None where the tokens' places are not known."""
        return None if self.place is None else (self.place.shape[0], self.place.shape[1])


def places_of(inputs: AttentionInputs, window: Window | None) -> TokenPlaces:
    """Where the tokens of one call are.

    Args:
        inputs: The call.
        window: The block that cut its windows, if one did.
    """
    site = inputs.site
    if window is not None:
        return window.places(inputs)
    if inputs.q.shape[0] > 1:
        return _unknown_windows(site.name)
    if inputs.token_state is not None and inputs.token_state.reduced:
        return _reduced_places(inputs.token_state, inputs.prefix)
    if not site.raster or 1 in inputs.query_grid:
        return TokenPlaces(why=f"the tokens of {site.name} are in no raster order")
    place, key_place = (
        torch.arange(grid[0] * grid[1]).view(grid) + inputs.prefix
        for grid in (inputs.query_grid, inputs.key_grid)
    )
    return TokenPlaces(place, key_place)


def _unknown_windows(name: str) -> TokenPlaces:
    return TokenPlaces(why=f"how {name} cuts the image into windows is not known")


def _reduced_places(token_state: TokenState, prefix: int) -> TokenPlaces:
    """Places in a sequence that is shorter than it was."""
    place, fused = patch_tokens(token_state), fused_tokens(token_state)
    gone = (place < 0) | torch.isin(place, torch.tensor(fused, dtype=torch.long))
    place = torch.where(gone, -1, place + prefix)
    return TokenPlaces(place, place, fused=tuple(token + prefix for token in fused))


def fused_tokens(token_state: TokenState) -> tuple[int, ...]:
    """The present patch tokens that are sums of dropped ones."""
    if token_state.ids is None:
        return ()
    return tuple((token_state.ids[0] < 0).nonzero().flatten().tolist())


def patch_tokens(token_state: TokenState) -> Tensor:
    """``[rows, columns]``: the present token of every original patch, -1 where it is gone."""
    if not token_state.steps:
        return torch.arange(token_state.n_original).view(token_state.grid)
    return token_state.source()[0].cpu().view(token_state.grid)


class Window:
    """A block that cuts its map into windows (Swin's, and those that never shift).

    Attributes:
        module: The block.
        map_size: Rows and columns of the map that it last took; None where it did not say.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.map_size: Grid | None = None

    def record_map(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the block."""
        values = [*args, *kwargs.values()]
        first = next((x for x in values if isinstance(x, Tensor)), None)
        if first is not None and first.dim() == 4:
            self.map_size = (first.shape[1], first.shape[2])
            return
        # transformers' Swin takes a sequence, and the size of its map as an argument
        size = next((x for x in values if isinstance(x, (tuple, list)) and len(x) == 2), None)
        self.map_size = None if size is None else (int(size[0]), int(size[1]))

    def places(self, inputs: AttentionInputs) -> TokenPlaces:
        """Where the tokens of a call inside this block are."""
        sides, size, name = inputs.query_grid, self.map_size, inputs.site.name
        if size is None or inputs.prefix or inputs.n_queries != inputs.n_keys:
            return _unknown_windows(name)
        padded = (-(-size[0] // sides[0]) * sides[0], -(-size[1] // sides[1]) * sides[1])
        if padded[0] * padded[1] != inputs.q.shape[0] * inputs.n_queries:
            return _unknown_windows(name)
        shift = _pair(getattr(self.module, "shift_size", 0))
        # where one window spans the map there is nothing to shift
        shift = (shift[0] if padded[0] > sides[0] else 0, shift[1] if padded[1] > sides[1] else 0)
        if any(shift) and padded != size:
            return TokenPlaces(why=f"the windows of {name} are shifted over a padded map")
        place = torch.roll(_windows(padded, sides), shift, (0, 1))[: size[0], : size[1]]
        return TokenPlaces(place, place)


def _windows(size: Grid, sides: Grid) -> Tensor:
    """``[rows, columns]``: number of the token at every place of an unshifted map."""
    windows = size[0] // sides[0], size[1] // sides[1]
    tokens = torch.arange(size[0] * size[1]).view(*windows, *sides)
    return tokens.transpose(1, 2).reshape(size)


def _pair(value: Any) -> Grid:
    rows, columns = value if isinstance(value, (tuple, list)) else (value, value)
    return int(rows), int(columns)


def window_of(model: nn.Module, site: str) -> Window | None:
    """The block that cuts the windows of a site: its own module, or one of the two around it."""
    names = site.split(".")
    for end in range(len(names), max(0, len(names) - 3), -1):
        module = model.get_submodule(".".join(names[:end]))
        size = getattr(module, "window_size", None)
        plain = type(module).__module__ in _PLAIN_WINDOWS and size
        if size is not None and (hasattr(module, "shift_size") or plain):
            return Window(module)
    return None
