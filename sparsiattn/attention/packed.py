"""Images with different numbers of tokens, packed into one sequence without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """A batch as one sequence ``[1, sum N_i, C]``.

    Attributes:
        states: The token state of each image.
        lengths: Tokens of each image, prefix included.
        layer: As in `TokenState`, and so are ``sequence``, ``returned`` and ``last``.
    """

    states: tuple[TokenState, ...]
    lengths: tuple[int, ...]
    layer: int = 0
    sequence: Tensor | None = None
    returned: Tensor | None = None
    last: Tensor | None = None

    @property
    def owner(self) -> int:
        """Key of the patch."""
        return self.states[0].owner

    @property
    def prefix(self) -> int:
        """Prefix tokens of each image."""
        return self.states[0].prefix

    @property
    def reduced(self) -> bool:
        """Always: images are packed by a reduction."""
        return True

    def bare(self) -> PackedTokens:
        """Without the activations."""
        states = tuple(state.bare() for state in self.states)
        return replace(self, states=states, sequence=None, returned=None, last=None)

    def slices(self) -> list[slice]:
        """Where each image lies in the packed sequence."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    def parts(self, x: Tensor, attention: Any) -> Iterator[tuple[TokenState, Tensor, Any]]:
        """Each image's stream, tokens ``[1, N_i, C]`` and `AttentionInputs`."""
        for i, (state, where) in enumerate(zip(self.states, self.slices(), strict=True)):
            yield state, x[:, where], None if attention is None else attention[i]

    def fit_side(self, table: Tensor) -> Tensor:
        """The table as it is, where it does not go by patches.

        Raises:
            InvalidOption: It does: hosts split the prefix off once, not once for each image, so a
                position table cannot be laid over packed images.
        """
        if self.states[0].is_side(table):
            raise InvalidOption(
                f"adaptive counts need blocks without position tables, and this model's take one "
                f"of shape {tuple(table.shape)} (RoPE): use a fixed keep, e.g. keep=0.7"
            )
        return table

    def source(self) -> Tensor:
        """As `source` below, for the whole batch."""
        return torch.cat([source(state, 1) for state in self.states])

    def restore_sequence(self, x: Tensor, how: str) -> Tensor:
        """``[B, N0, C]``: every image with its original positions."""
        rows = [state.restore_sequence(part, how) for state, part, _ in self.parts(x, None)]
        return torch.cat(rows)


def pack(parts: Sequence[tuple[TokenState, Tensor]]) -> tuple[PackedTokens, Tensor]:
    """Images ``[1, N_i, C]`` one after the other."""
    states = tuple(state for state, _ in parts)
    lengths = tuple(x.shape[1] for _, x in parts)
    return PackedTokens(states, lengths), torch.cat([x for _, x in parts], dim=1)


def unpack(x: Tensor, packed: PackedTokens) -> Tensor:
    """``[B, max N_i, C]``; shorter images repeat their last token, so that maxima stay right."""
    longest = max(packed.lengths)
    rows = []
    for _, part, _ in packed.parts(x, None):
        rest = longest - part.shape[1]
        rows.append(torch.cat([part, part[:, -1:].expand(-1, rest, -1)], dim=1) if rest else part)
    return torch.cat(rows)


def source(carried: TokenState | PackedTokens, batch: int) -> Tensor:
    """``[B, N0]``: place of every original token in the final sequence, -1 where it is gone."""
    if isinstance(carried, PackedTokens):
        return carried.source()
    special = carried.prefix + carried.suffix
    if not carried.steps:
        return torch.arange(special + carried.n_original).expand(batch, -1)
    assert carried.ids is not None
    patches, count = carried.source(), carried.ids.shape[1]
    places = torch.arange(special, device=patches.device).expand(len(patches), -1)
    prefix, suffix = places[:, : carried.prefix], places[:, carried.prefix :] + count
    moved = torch.where(patches >= 0, patches + carried.prefix, -1)
    return torch.cat([prefix, moved, suffix], dim=1)
