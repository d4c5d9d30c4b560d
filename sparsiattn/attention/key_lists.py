"""Key lists: the patterns that sparse kernels compute. The core makes them from `Ranked` scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid, Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import SizedPattern, scatter_true
from sparsiattn.errors import InvalidOption


class KeyLists(SizedPattern):
    """A list of keys for every tile of queries; prefix queries see every key.

    Attributes:
        index: ``[B|1, H|1, T, K]``, ids of the keys.
        tiles: How patch queries are grouped; None where every patch query has its own list.
        dense_rows: Number of leading prefix queries.
    """

    index: Tensor
    tiles: Tiles | None
    dense_rows: int

    @property
    def width(self) -> int:
        """Number of keys of every list, K; summary keys not counted."""
        return self.index.shape[-1]

    def to_mask(self) -> Tensor:
        rows = scatter_true(self.index, self.n_keys)
        if self.tiles is not None:
            rows = self.tiles.spread(rows)
        if not self.dense_rows:
            return rows
        full = rows.new_ones(*rows.shape[:2], self.dense_rows, self.n_keys)
        return torch.cat([full, rows], dim=-2)

    def pairs(self) -> float:
        keys = self.width + (self.summary.count if self.summary else 0)
        patches = self.n_queries - self.dense_rows
        return float(self.dense_rows * self.n_keys + patches * keys)

    def summary_rows(self) -> Tensor | None:
        if self.summary is None:
            return None
        bias = self.summary.bias
        if self.tiles is not None and bias.shape[-2] != self.n_queries - self.dense_rows:
            bias = self.tiles.spread(bias)
        if not self.dense_rows:
            return bias
        # prefix queries attend to every key, so they need no summary
        none = bias.new_full((*bias.shape[:2], self.dense_rows, bias.shape[-1]), float("-inf"))
        return torch.cat([none, bias], dim=-2)


@dataclass(frozen=True, eq=False)
class KeyIndex(KeyLists):
    """Lists of single keys; see `KeyLists`.

    Attributes:
        window: Rows and columns of the neighbourhood that each list is: the lists of
            `sparsiattn.attention.neighbourhood`, after the prefix keys if they start with them.
            None for any other lists.

    >>> from sparsiattn.testing.hosts import random_inputs
    >>> inputs = random_inputs((1, 3), prefix=1)
    >>> pairs = KeyIndex.of(inputs, torch.tensor([[[[0, 1], [0, 2], [2, 3]]]]))
    >>> pairs.to_mask().sum(-1).tolist()  # the prefix query attends to all keys
    [[[4, 2, 2, 2]]]
    """

    index: Tensor
    tiles: Tiles | None = None
    dense_rows: int = 0
    window: Grid | None = None

    @classmethod
    def of(cls, inputs: AttentionInputs, index: Tensor, window: Grid | None = None) -> KeyIndex:
        """The pattern of a call with given lists; prefix queries attend to all keys.

        For planners whose lists do not depend on values, such as windows: lists take less memory
        than a mask. The core adds no prefix keys to them.

        Args:
            inputs: The operands of the call.
            index: Ids of keys, int64 ``[B|1, H|1, R, K]``, prefix keys counted, with one row per
                patch query or, where there are tiles, per tile; no key twice in a row.
            window: The neighbourhood that the lists are; see above.

        Raises:
            InvalidOption: The shape or the type does not fit.
        """
        tiles = inputs.tiles
        rows = inputs.n_queries - inputs.prefix if tiles is None else tiles.count
        if index.dtype != torch.int64 or index.dim() != 4 or index.shape[-2] != rows:
            raise InvalidOption(
                f"site {inputs.site.name!r} needs lists [B|1, H|1, {rows}, K] of int64, got "
                f"{index.dtype} of shape {tuple(index.shape)}"
            )
        sizes = inputs.n_queries, inputs.n_keys
        return cls(*sizes, index=index, tiles=tiles, dense_rows=inputs.prefix, window=window)


@dataclass(frozen=True, eq=False)
class KeyBlocks(KeyLists):
    """Lists of key blocks, the layout of block-sparse kernels; see `KeyLists`.

    Attributes:
        chosen: ``[B|1, H|1, T, C]``, ids of blocks, best first.
        blocks: The patch keys of every block, as compact tiles of their grid.
        keys: Length of every list, K. A list starts with the ``prefix`` leading keys, and its last
            block is cut to fit.
        prefix: Number of leading keys, which are in every list.
    """

    chosen: Tensor
    blocks: Tiles
    keys: int
    prefix: int = 0
    tiles: Tiles | None = None
    dense_rows: int = 0

    @property
    def width(self) -> int:
        return self.keys

    @property
    def index(self) -> Tensor:  # type: ignore[override]
        """Ids of the keys, ``[B|1, H|1, T, K]``: the prefix, then block by block."""
        keys = self.blocks.order[self.chosen].flatten(-2) + self.prefix
        if not self.blocks.even:
            keys = keys.gather(-1, self._present())
        keys = keys[..., : self.keys - self.prefix]
        first = torch.arange(self.prefix, device=keys.device).expand(*keys.shape[:-1], -1)
        return torch.cat([first, keys], dim=-1) if self.prefix else keys

    def _present(self) -> Tensor:
        """An order of slots in which those that repeat a token come last."""
        absent = (self.blocks.weight == 0)[self.chosen].flatten(-2)
        return absent.to(torch.uint8).argsort(dim=-1, stable=True)
