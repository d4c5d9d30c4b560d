"""The strategy `token_merge`: merges similar tokens.

Implements ToMe (ICLR 2023, arXiv 2210.09461) and PiToMe (NeurIPS 2024, arXiv 2405.16148), written
from the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.derivatives import is_exporting
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import take
from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.native import merge
from sparsiattn.strategies.base import check_flag
from sparsiattn.strategies.reduction import Merge, Merged, Reduction
from sparsiattn.strategies.token_base import TokenInputs, TokenStrategy

METHODS = ("tome", "pitome")
SHARE = 0.95
"""The default of ``ratio``.

At 196 patches, 12 blocks then process as many tokens in total as with ``r=8``; at other sizes the
number is proportional.
"""
BSM = ("first", "last", None)

Rate = int | Sequence[Any] | Callable[[Site], int]


@dataclass(frozen=True)
class TokenMerge(TokenStrategy):
    """Merges the most similar pairs of patch tokens in every block: a share of them, or ``r``.

    A share has the same effect at every image size, but a number does not: ``r=8`` is a large part
    of 196 tokens, but so small a part of 1,369 that finding the pairs takes longer than it saves.

    Args:
        r: Number of tokens to remove in each block: an int, a list with one per layer, a function
            of the `Site`, or ``(r, inflect)`` with a float in [-1, 1] for a rate that grows
            (inflect > 0) or falls linearly with the same total (ToMe, appendix). At most half of
            the tokens can be merged in a block. None to use ``ratio``.
        ratio: Share of the tokens that every layer keeps, ``r = floor(n - ratio * n)``, as in
            PiToMe. It is 0.95 if neither is given; fewer than 20 tokens are then not merged.
        method: ``"tome"`` pairs alternate tokens by the cosine similarity of their keys;
            ``"pitome"`` merges tokens of high energy (similar to many others) and protects the
            rest.
        proportional: Whether keys are weighted by the number of patches in their tokens.
        bsm: The half of the layers in which ``"pitome"`` splits all tokens instead of its 2 r most
            redundant ones (``"first"`` as published for DeiT, ``"last"`` for MAE, None for no
            layer).
        layers: As in `TokenStrategy`; None is all blocks.

    >>> TokenMerge(r=(8, 0.5)).rates(4)
    [4, 6, 9, 12]
    >>> TokenMerge().rate(196), TokenMerge().rate(1369)
    (9, 68)
    """

    name = "token_merge"
    paper = "https://arxiv.org/abs/2210.09461"
    fidelity = "as published (ToMe), written from its formulas"
    per_layer = ("r",)
    needs_attention = True
    suite = MappingProxyType({"ordered": True})  # alternate tokens are paired

    r: Rate | None = None
    ratio: float | None = SHARE
    method: str = "tome"
    proportional: bool = True
    bsm: str | None = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise InvalidOption(f"method must be one of {METHODS}, got {self.method!r}")
        if self.bsm not in BSM:
            raise InvalidOption(f"bsm must be one of {BSM}, got {self.bsm!r}")
        check_flag("proportional", self.proportional)
        if self.r is None and self.ratio is None:
            object.__setattr__(self, "ratio", SHARE)
        elif self.r is not None and self.ratio == SHARE:  # r replaces the default of ratio
            object.__setattr__(self, "ratio", None)
        ratio = self.ratio
        if ratio is not None and not (isinstance(ratio, float) and 0.5 <= ratio <= 1.0):
            raise InvalidOption(f"ratio must be a float in [0.5, 1] or None, got {ratio!r}")
        if ratio is not None and self.r is not None:
            raise InvalidOption(
                f"pass only one of r and ratio, which both set the rate; got r={self.r!r} and "
                f"ratio={ratio!r}"
            )
        if self.r is not None:
            self._check_rates()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TokenMerge:
        options = saved["options"]
        if options.get("ratio") is not None:
            # files from before ratio was the default contain the default r, too
            options = {**options, "r": None}
        return super().from_dict({**saved, "options": options})

    def _check_rates(self) -> None:
        rates: Sequence[Any] = self.r if isinstance(self.r, (list, tuple)) else [self.r]
        if self._inflected():
            rates, inflect = rates[:1], rates[1]
            if not -1.0 <= inflect <= 1.0:
                raise InvalidOption(
                    f"inflect in r=(r, inflect) must be within [-1, 1], got {self.r!r}"
                )
        for r in () if callable(self.r) else rates:
            if type(r) is not int or r < 0:
                raise InvalidOption(
                    "r must be an int >= 0 (tokens merged per block), a list of them, or "
                    f"(r, inflect) with a float inflect; got {r!r}"
                )

    def _inflected(self) -> bool:
        """Whether ``r`` is ``(r, inflect)``, a pair whose second element is a float."""
        r = self.r
        return isinstance(r, (list, tuple)) and len(r) == 2 and isinstance(r[1], float)

    def rates(self, count: int) -> list[int]:
        """Number of tokens to merge at each of ``count`` layers, for ``r=(r, inflect)``."""
        assert isinstance(self.r, (list, tuple))
        r, inflect = self.r
        low = int(r * (1.0 - inflect))
        step = (2 * r - 2 * low) / max(1, count - 1)
        return [int(low + step * i) for i in range(count)]

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def proportional_attention(self) -> bool:
        return self.proportional

    def merges(self) -> bool:
        return True

    def _resolve(self, name: str, site: Site, position: int, count: int) -> Any:
        if name == "r" and self._inflected():
            return self.rates(count)[position]
        value = super()._resolve(name, site, position, count)
        if name == "r" and value is None and self.r is not None:
            raise InvalidOption(f"r must be a number of tokens at {site.name!r}, got None")
        return value

    def check(self, tokens: int, first: bool) -> None:
        limit = tokens // 2 if first else tokens
        if isinstance(self.r, int) and self.r > limit:
            raise InvalidOption(
                f"r={self.r} exceeds half of the {tokens} patch tokens there, the most that one "
                "block can merge"
            )

    def rate(self, tokens: int) -> int:
        """Number of tokens to merge out of ``tokens``."""
        if self.ratio is not None:
            return min(math.floor(tokens - tokens * self.ratio), tokens // 2)
        assert isinstance(self.r, int)
        return min(self.r, tokens // 2)

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        r = self.rate(tokens.count)
        if r <= 0:
            return None
        inputs = tokens.attention
        assert inputs is not None
        if self.method == "tome" and merge.merges(inputs.k, tokens.x, tokens.size):
            return merge_natively(tokens, inputs, r)
        # the sum over heads has the same direction as their mean
        keys = F.normalize(inputs.k.sum(1)[:, inputs.prefix :], dim=-1)
        if self.method == "tome":
            odd = inputs.prefix % 2
            sides = geometry.table(alternate, tokens.count, odd, device=keys.device)
            likeness = keys[:, odd::2] @ keys[:, 1 - odd :: 2].mT
            return merge_pairs(tokens, likeness, sides, r)
        return self._by_energy(tokens, keys, r)

    def _by_energy(self, tokens: TokenInputs, keys: Tensor, r: int) -> Reduction:
        """Merge by energy (PiToMe, section 3): tokens similar to many others are merged first."""
        order = by_rank(energy(keys, tokens.layer, tokens.depth))
        half = math.ceil(tokens.depth / 2)
        early = tokens.layer < half
        split_all = self.bsm is not None and early == (self.bsm == "first")
        end = None if split_all else 2 * r
        first, second = order[:, :end:2], order[:, 1:end:2]
        likeness = take(keys, first) @ take(keys, second).mT
        protected = None if end is None else order[:, end:]
        return merge_pairs(tokens, likeness, (first, second), r, protected)


def by_rank(values: Tensor) -> Tensor:
    """Indices that sort ``[B, n]`` in descending order, equal values in ascending index order."""
    if is_exporting():  # ONNX sorts stably, but torch's exporter lacks stable=True
        return values.argsort(dim=1, descending=True)
    return values.argsort(dim=1, descending=True, stable=True)


def alternate(count: int, odd: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of alternate tokens of the sequence, ``[1, a]`` and ``[1, b]`` (ToMe, section 3.1).

    Args:
        count: Number of patch tokens.
        odd: 1 if the number of prefix tokens is odd, else 0.
        device: Device of the result.
    """
    numbers = torch.arange(count, device=device)[None]
    return numbers[:, odd::2].contiguous(), numbers[:, 1 - odd :: 2].contiguous()


def energy(keys: Tensor, layer: int, depth: int) -> Tensor:
    """Mean over all tokens of ELU(cosine - margin), ``[B, n]`` (PiToMe, eq. 4).

    Args:
        keys: Keys of unit length, ``[B, n, D]``.
        layer: The block's index; the margin falls from 0.75 with depth.
        depth: Number of blocks.
    """
    margin = 0.75 - 0.75 * layer / depth
    return F.elu(keys @ keys.mT - margin).mean(-1)


def merge_pairs(
    tokens: TokenInputs,
    likeness: Tensor,
    sides: tuple[Tensor, Tensor],
    r: int,
    protected: Tensor | None = None,
) -> Reduction:
    """Merge the ``r`` tokens of the first side that are most similar to one of the second side.

    The new order is: protected tokens, remaining tokens of the first side, tokens of the second
    side. Values are means weighted by size.

    Args:
        tokens: The inputs of the reduction.
        likeness: Similarity of the two sides, ``[B, a, b]``.
        sides: Indices of the tokens on each side, ``[B|1, a]`` and ``[B|1, b]``.
        r: Number of tokens to merge.
        protected: Indices of tokens that are never merged, ``[B, p]``.
    """
    batch, x = likeness.shape[0], tokens.x  # len() would tie an exported program to this batch
    first, second = (side.expand(batch, -1) for side in sides)
    best = likeness.max(-1)
    ranked = by_rank(best.values)
    source, remaining = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    target = best.indices.gather(1, source)
    moved, kept = first.gather(1, source), first.gather(1, remaining)
    if protected is not None:
        kept = torch.cat([protected, kept], dim=1)
    into, index = target + kept.shape[1], torch.cat([kept, second], dim=1)
    if tokens.size is None:
        weight, before = torch.ones_like(best.values[:, :r]), torch.ones_like(best.values[:1, :1])
        before = before.expand(index.shape)
    else:
        weight, before = tokens.size.gather(1, moved), tokens.size.gather(1, index)
    size = before.scatter_add(1, into, weight)
    # mean = x_b + sum over a of (s_a / s) (x_a - x_b), which needs only the merged tokens
    share = (weight / size.gather(1, into))[..., None].to(x.dtype)
    shift = (take(x, moved) - take(x, second.gather(1, target))) * share
    assign = partial(assignment, kept, second, moved, target)
    return Merge(index, assign, size=size, added=(into, shift))


def merge_natively(tokens: TokenInputs, inputs: AttentionInputs, r: int) -> Reduction:
    """`merge_pairs` for alternate tokens, in one call of compiled code."""
    operands = inputs.k, tokens.x, tokens.size
    merged = merge.merged(*operands, r, inputs.prefix, tokens.ahead)
    sequence, index, assign, size, logs = merged
    return Merged(index, assign, size=size, sequence=sequence, logs=logs)


def assignment(kept: Tensor, second: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """The new position of every token, ``[B, n]``."""
    stay = torch.cat([kept, second], dim=1)
    place = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    new = stay.new_zeros(stay.shape[0], stay.shape[1] + moved.shape[1]).scatter(1, stay, place)
    return new.scatter(1, moved, target + kept.shape[1])
