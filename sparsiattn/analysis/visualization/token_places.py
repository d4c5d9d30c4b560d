"""Positions of the tokens of an attention call in the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention import AttentionInputs, Grid, TokenState

_PLAIN_WINDOWS = ("timm.models.vision_transformer_sam",)
"""Modules whose blocks divide the map into windows in raster order without shifts."""


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Tokens by patch. Tokens are numbered window by window, including prefix tokens.

    Attributes:
        place: ``[rows, columns]``, the query token of each patch, -1 if it was dropped; None if
            positions are not known.
        key_place: The same for keys.
        why: Why positions are not known; empty if they are.
        fused: Tokens that contain the sum of dropped tokens, which have no position.
    """

    place: Tensor | None = None
    key_place: Tensor | None = None
    why: str = ""
    fused: tuple[int, ...] = ()

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of patches; None if the positions of tokens are not known."""
        return None if self.place is None else (self.place.shape[0], self.place.shape[1])


def places_of(inputs: AttentionInputs, window: Window | None) -> TokenPlaces:
    """Find the positions of the tokens of one call.

    Args:
        inputs: The call.
        window: The block that divides the map into windows; None if there is none.
    """
    site = inputs.site
    if window is not None:
        return window.places(inputs)
    if inputs.q.shape[0] > 1:
        return _unknown_windows(site.name)
    if inputs.token_state is not None and inputs.token_state.reduced:
        return _reduced_places(inputs.token_state, inputs.prefix)
    if not site.raster or 1 in inputs.query_grid:
        return TokenPlaces(why=f"the tokens of {site.name} are not in raster order")
    place, key_place = (
        _raster(grid, inputs) + inputs.prefix for grid in (inputs.query_grid, inputs.key_grid)
    )
    return TokenPlaces(place, key_place)


def _raster(grid: Grid, inputs: AttentionInputs) -> Tensor:
    """The patch token at every position of a grid, whose frames are stacked vertically."""
    depth = 1 if inputs.order is None else inputs.order.depth
    if depth == 1:
        return torch.arange(grid[0] * grid[1]).view(grid)
    rows = grid[0] // (inputs.views * depth)
    tokens = torch.arange(grid[0] * grid[1]).view(inputs.views, rows, depth, grid[1])
    return tokens.transpose(1, 2).reshape(grid)


def _unknown_windows(name: str) -> TokenPlaces:
    return TokenPlaces(why=f"it is not known how {name} divides the image into windows")


def _reduced_places(token_state: TokenState, prefix: int) -> TokenPlaces:
    """Positions in a shortened sequence."""
    place, fused = patch_tokens(token_state), fused_tokens(token_state)
    is_dropped = (place < 0) | torch.isin(place, torch.tensor(fused, dtype=torch.long))
    place = torch.where(is_dropped, -1, place + prefix)
    return TokenPlaces(place, place, fused=tuple(token + prefix for token in fused))


def fused_tokens(token_state: TokenState) -> tuple[int, ...]:
    """The patch tokens that are sums of dropped tokens."""
    if token_state.ids is None:
        return ()
    return tuple((token_state.ids[0] < 0).nonzero().flatten().tolist())


def patch_tokens(token_state: TokenState) -> Tensor:
    """The current token of every original patch, ``[rows, columns]``; -1 if it was dropped."""
    if not token_state.steps:
        return torch.arange(token_state.n_original).view(token_state.grid)
    return token_state.source()[0].cpu().view(token_state.grid)


class Window:
    """A block that divides its map into windows, shifted (Swin) or not.

    Attributes:
        module: The block.
        map_size: Rows and columns of its last map; None if unknown.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.map_size: Grid | None = None

    def record_map(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the block, which stores the size of its map."""
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
        # a window that spans the whole map is not shifted
        shift = (shift[0] if padded[0] > sides[0] else 0, shift[1] if padded[1] > sides[1] else 0)
        if any(shift) and padded != size:
            return TokenPlaces(why=f"the windows of {name} are shifted over a padded map")
        place = torch.roll(_windows(padded, sides), shift, (0, 1))[: size[0], : size[1]]
        return TokenPlaces(place, place)


def _windows(size: Grid, sides: Grid) -> Tensor:
    """Index of the token at every position of an unshifted map, ``[rows, columns]``."""
    windows = size[0] // sides[0], size[1] // sides[1]
    tokens = torch.arange(size[0] * size[1]).view(*windows, *sides)
    return tokens.transpose(1, 2).reshape(size)


def _pair(value: Any) -> Grid:
    rows, columns = value if isinstance(value, (tuple, list)) else (value, value)
    return int(rows), int(columns)


def window_of(model: nn.Module, site: str) -> Window | None:
    """The block that divides a site's map into windows: its module, or one of two parents."""
    names = site.split(".")
    for end in range(len(names), max(0, len(names) - 3), -1):
        module = model.get_submodule(".".join(names[:end]))
        size = getattr(module, "window_size", None)
        plain = type(module).__module__ in _PLAIN_WINDOWS and size
        if size is not None and (hasattr(module, "shift_size") or plain):
            return Window(module)
    return None
