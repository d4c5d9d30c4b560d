"""Sparse attention of packed images without the library's packing: every call of attention is put
into raster order by plain loops, planned on a site of its own, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Site, Strategy, Structure
from sparsiattn.kernels.reference import Reference
from sparsiattn.strategies.finalize import finish

Size = tuple[int, int, int]


def squares(rows: int, columns: int, side: int) -> list[tuple[int, int]]:
    """Rows and columns of patches that go square by square."""
    return [
        (row, column)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for row in range(top, min(top + side, rows))
        for column in range(left, min(left + side, columns))
    ]


def windows(rows: int, columns: int, window: int, side: int) -> list[list[tuple[int, int]]]:
    """The patches of every window, square by square."""
    return [
        [
            (top + row, left + column)
            for row, column in squares(min(window, rows - top), min(window, columns - left), side)
        ]
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]


@dataclass(frozen=True)
class Part:
    """grid: rows and columns of one frame; patches: frame, row and column of every token."""

    grid: tuple[int, int]
    patches: tuple[tuple[int, int, int], ...]
    frames: int = 1


def frames_of(sizes: Sequence[Size], side: int, window: int | None = None) -> list[Part]:
    """One part for every frame, in the order in which a host has its tokens."""
    parts = []
    for frames, rows, columns in sizes:
        places = squares(rows, columns, side)
        if window is not None:
            places = [place for part in windows(rows, columns, window, side) for place in part]
        parts += [Part((rows, columns), tuple((0, *place) for place in places))] * frames
    return parts


def clips_of(sizes: Sequence[Size], side: int) -> list[Part]:
    """One part for every image or clip, with its frames one after another."""
    return [
        Part(
            (rows, columns),
            tuple((f, *place) for f in range(frames) for place in squares(rows, columns, side)),
            frames,
        )
        for frames, rows, columns in sizes
    ]


def windows_of(sizes: Sequence[Size], side: int, window: int) -> list[Part]:
    """One part for every window, its rows and columns counted from its own corner."""
    parts = []
    for frames, rows, columns in sizes:
        for places in windows(rows, columns, window, side) * frames:
            top, left = min(places)
            grid = (max(r for r, _ in places) - top + 1, max(c for _, c in places) - left + 1)
            parts.append(Part(grid, tuple((0, r - top, c - left) for r, c in places)))
    return parts


def attend(strategy: Strategy, part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Sparse attention of one part on a site in raster order, by the reference kernel."""
    order = sorted(range(len(part.patches)), key=part.patches.__getitem__)
    q, k, v = (x[:, :, order].contiguous() for x in (q, k, v))
    grid = part.frames * part.grid[0], part.grid[1]
    structure = Structure(part.grid, part.frames, source="by hand")
    site = Site.of(q, k, v, grid=grid, key_grid=grid, structure=structure)
    tile = strategy.tile_for(site.tokens)
    assert isinstance(tile, int) or len(tile) == 2
    block = strategy.block_for(site.tokens, tile)
    inputs = AttentionInputs(q, k, v, scale, None, site, tile=tile, block=block)
    background = strategy.background_for(inputs.key_grid, inputs.key_views)
    if strategy.keeps_all(site.tokens):
        out = inputs.attention()
    else:
        pattern = finish(strategy.planner(site)(inputs), inputs, background=background)
        out = Reference()(inputs, pattern)
    back = sorted(range(len(order)), key=order.__getitem__)
    return out[:, :, back]


@contextmanager
def attending(strategy: Strategy, parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Inside the block, calls of attention are those of these parts, one after another."""
    left = list(parts)

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
        scale = options.get("scale") or q.shape[-1] ** -0.5
        return attend(strategy, left.pop(0), q, k, v, scale)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield left


class Tower(nn.Module):
    """Packed images in squares of ``merge``; their layers attend image by image in one call.

    masked: whether a mask keeps images apart, or else a call for each image does; places: what
    turns rows and columns into embeddings, `Places` by default.
    """

    def __init__(
        self, merge: int = 2, *, masked: bool, clips: bool = False, places: Any = None
    ) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(
            spatial_merge_size=merge, _attn_implementation_internal="sdpa"
        )
        self.merge, self.masked, self.clips = merge, masked, clips
        self.embed, self.places = nn.Linear(12, 32), Places() if places is None else places
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, cu_seqlens: Any = None) -> Tensor:
        sizes = [(t, h, w) for t, h, w in grid_thw.tolist()]
        parts = clips_of(sizes, self.merge) if self.clips else frames_of(sizes, self.merge)
        ids = [place for part in clips_of(sizes, self.merge) for place in part.patches]
        x = self.embed(hidden_states) + self.places(torch.tensor(ids)[:, 1:])
        lengths = [len(part.patches) for part in parts]
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
        for layer in self.layers:
            x = layer(x, lengths, self.masked)
        return x


class Places(nn.Module):
    def forward(self, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, :, None] * torch.arange(1, 9) / 5
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def _table() -> Tensor:
    """The embeddings of 16 rows or columns, ``[16, 16]``."""
    return Places()(torch.arange(16)[:, None])


def read_at_once(positions: Tensor) -> Tensor:
    """What `Places` returns, read from a table of angles with all rows and columns."""
    return _table()[positions].flatten(1)


def read_by_embedding(positions: Tensor) -> Tensor:
    return F.embedding(positions, _table()).flatten(1)


def read_in_pairs(positions: Tensor) -> Tensor:
    """The same from a table with an entry for each row and column."""
    table, shape = _table(), (16, 16, 16)
    pairs = torch.cat([table[:, None].expand(shape), table[None].expand(shape)], -1)
    return pairs[positions[:, 0], positions[:, 1]]


class Layer(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, lengths: list[int], masked: bool) -> Tensor:
        q, k, v = self.qkv(x).view(1, len(x), 3, 2, 16).permute(2, 0, 3, 1, 4)
        if masked:
            image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            mask = image[:, None] == image
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            parts = zip(*(a.split(lengths, 2) for a in (q, k, v)), strict=True)
            out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        return x + self.proj(out.transpose(1, 2).reshape(len(x), 32))
