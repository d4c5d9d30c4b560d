"""Images of different sizes that the host padded to one length, with tokens dropped or merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.padding import OwnTokens
from sparsiattn.attention.token_state import TokenState


@dataclass(frozen=True, eq=False)
class PaddedTokens(PackedTokens):
    """A batch ``[B, M, C]`` in which every image has its own number of tokens.

    Each image's token state counts the image's own tokens only, as if there were no padding.
    Before the first reduction these lie where the host put them. After it they come first in the
    image's row, followed by zeros that no query attends to.

    Attributes:
        rows: Positions of each image's tokens in its row of the current sequence.
        own: Their positions before any reduction.
    """

    rows: tuple[Tensor, ...] = field(kw_only=True)
    own: OwnTokens = field(kw_only=True)

    @classmethod
    def of(cls, states: Sequence[TokenState], own: OwnTokens, layer: int) -> PaddedTokens:
        """A batch before any reduction."""
        lengths = tuple(len(places) for places in own.places)
        return cls(tuple(states), lengths, layer, rows=own.places, own=own)

    @property
    def reduced(self) -> bool:
        """Whether any image carries fewer tokens than at the start."""
        return any(state.reduced for state in self.states)

    @property
    def policy(self) -> Tensor | None:
        """As in `TokenState`, over all patches ``[B, n0]``; padding counts as dropped."""
        policies = [state.policy for state in self.states]
        if any(policy is None for policy in policies):
            return None
        rows = [F.pad(p, (self.prefix, 0))[..., None] for p in policies if p is not None]
        return self._spread(rows)[:, self.prefix :, 0]

    @property
    def longest(self) -> int:
        """Length of a row of the current sequence."""
        return max(self.lengths) if self.reduced else self.own.total

    def parts(self, x: Tensor, attention: Any) -> Iterator[tuple[TokenState, Tensor, Any]]:
        for i, (state, row) in enumerate(zip(self.states, self.rows, strict=True)):
            yield state, x[i : i + 1, row], None if attention is None else attention[i]

    def advanced(self, parts: Sequence[tuple[TokenState, Tensor]]) -> tuple[PaddedTokens, Tensor]:
        """The batch after every image was reduced to tokens ``[1, m, C]``."""
        states = tuple(state for state, _ in parts)
        lengths = tuple(x.shape[1] for _, x in parts)
        device = self.rows[0].device
        rows = tuple(torch.arange(length, device=device) for length in lengths)
        state = replace(self, states=states, lengths=lengths, rows=rows)
        return state, _batch([x for _, x in parts])

    def fit_side(self, table: Tensor) -> Tensor:
        """A position table reduced to the current tokens, zeros for padding; see `TokenState`."""
        n0 = self.own.total - self.prefix
        shape = replace(self.states[0], grid=(1, n0))
        if not self.reduced or not shape.is_side(table):
            return table
        table = table[(None,) * (4 - table.dim())]
        parts = []
        for i, (state, places) in enumerate(zip(self.states, self.own.places, strict=True)):
            rows = table[i : i + 1] if table.shape[0] > 1 else table
            rows = rows[:, :, places[self.prefix :] - self.prefix]
            rows = rows if state.ids is None else rows[:, :, state.positions()[0]]
            parts.append(F.pad(rows, (0, 0, 0, self.longest - self.prefix - rows.shape[2])))
        return torch.cat(parts)

    def follow(self, x: Tensor) -> Tensor:
        """The current tokens, selected from a sequence ``[B, N0, C]`` of all original positions."""
        parts = []
        for i, (state, places) in enumerate(zip(self.states, self.own.places, strict=True)):
            image = x[i : i + 1, places]
            parts.append(image if state.ids is None else image[:, state.tokens()[0]])
        return _batch(parts)

    def restore_sequence(self, x: Tensor, how: str) -> Tensor:
        """Every image at its original positions, zeros for padding, ``[B, N0, C]``."""
        rows = [state.restore_sequence(part, how) for state, part, _ in self.parts(x, None)]
        return self._spread(rows)

    def source(self) -> Tensor:
        """Position of every original token in the current sequence, -1 if it is gone, ``[B, N0]``.

        Padding counts as gone.
        """
        images = zip(self.states, self.rows, strict=True)
        # 0 marks padding here, so positions count from 1 until the end
        places = [(_places(state, row) + 1)[..., None] for state, row in images]
        return self._spread(places)[..., 0] - 1

    def _spread(self, rows: Sequence[Tensor]) -> Tensor:
        """Each image's ``[1, N, C]`` over its own tokens to ``[B, N0, C]``, zeros for padding."""
        out = []
        for row, places in zip(rows, self.own.places, strict=True):
            empty = row.new_zeros(1, self.own.total, row.shape[2])
            out.append(empty.index_copy(1, places, row))
        return torch.cat(out)


def _places(state: TokenState, row: Tensor) -> Tensor:
    """Position of each of an image's own tokens in its row, -1 if it is gone, ``[1, N]``.

    Args:
        state: The token state of the image.
        row: Positions of its current tokens.
    """
    if not state.steps:
        return row[None]
    patches = state.source()
    patches = torch.where(patches >= 0, row[patches.clamp_min(0) + state.prefix], -1)
    return torch.cat([row[None, : state.prefix], patches], dim=1)


def _batch(parts: Sequence[Tensor]) -> Tensor:
    """Images ``[1, m, C]`` as one batch, shorter ones padded with zeros."""
    longest = max(x.shape[1] for x in parts)
    return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in parts])
