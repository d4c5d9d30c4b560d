"""`Reduction`: what happens to patch tokens at one block. Each kind knows how to apply itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.auto_options import TILE_FROM
from sparsiattn.attention.budget import Budget, count_of
from sparsiattn.attention.token_state import Assign, ReductionStep, TokenState, Unfold, take
from sparsiattn.errors import InvalidType

COMPACT_RUNS = ((8, 8), (4, 4))
"""Tile and block of the token order in which runs of 64, 32 and 16 tokens are image neighbours."""

Reduced = tuple[TokenState, Tensor]
"""A token state and the sequence ``[B, N, C]`` that it describes."""


class Reduction:
    """What happens to ``n`` patch tokens at one block.

    Make one with `keep`, `top`, `where`, `merge`, `cluster`, `mix` or `weigh`.

    >>> Reduction.keep(torch.tensor([[0, 2]])).index.tolist()
    [[0, 2]]
    """

    def apply(self, state: TokenState, x: Tensor) -> Reduced:
        """Apply the reduction to ``x`` ``[B, N, C]``, prefix included."""
        raise NotImplementedError

    @staticmethod
    def keep(index: Tensor) -> Keep:
        """Keep the tokens at ``index`` ``[B, m]``, in that order."""
        return Keep(index)

    @staticmethod
    def top(scores: Tensor, keep: Budget, fuse: Tensor | None = None) -> Keep | None:
        """Keep the tokens with the best scores, in their original order.

        Args:
            scores: ``[B, n]``, higher is better.
            keep: Share or count of the tokens to keep.
            fuse: ``[B, n]``, weights of dropped tokens in a sum that is added as one more token;
                None to drop them.

        Returns:
            The reduction; None if all tokens are kept.

        >>> Reduction.top(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.5).index.tolist()
        [[1, 3]]
        """
        n = scores.shape[1]
        count = count_of(keep, n)
        if count == n:
            return None
        return Keep(scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values, fuse)

    @staticmethod
    def where(mask: Tensor, fuse: Tensor | None = None) -> KeepRagged:
        """Keep the tokens where a boolean mask is True; images may keep different numbers.

        Args:
            mask: ``[B, n]``.
            fuse: As in `top`.

        Raises:
            InvalidType: The mask is not boolean or not of two dimensions.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise InvalidType(
                f"Reduction.where needs a boolean [B, n] tensor, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}; compare your scores with a threshold first"
            )
        return KeepRagged(mask, fuse)

    @staticmethod
    def merge(x: Tensor, assign: Tensor, index: Tensor, size: Tensor | None = None) -> Merge:
        """Merge clusters into the means of their tokens.

        Args:
            x: The tokens, ``[B, n, C]``.
            assign: The cluster of each token, ``[B, n]``.
            index: The token whose position each cluster gets, ``[B, m]``.
            size: Number of patches in each token so far, ``[B, n]``, the weights of the mean; None
                if all are 1.
        """
        weight = torch.ones_like(assign, dtype=torch.float) if size is None else size
        into = assign[..., None].expand_as(x)
        total = x.new_zeros(x.shape[0], index.shape[1], x.shape[2]).scatter_add(
            1, into, x * weight[..., None].to(x.dtype)
        )
        sizes = weight.new_zeros(index.shape).scatter_add(1, assign, weight)
        return Merge(index, assign, total / sizes[..., None].to(x.dtype), sizes)

    @staticmethod
    def cluster(
        index: Tensor,
        assign: Assign,
        *,
        values: Tensor | None = None,
        size: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        unfold: Unfold | None = None,
    ) -> Merge:
        """Merge clusters whose values the strategy has computed itself.

        Args:
            index: As in `Merge`.
            assign: As in `Merge`.
            values: As in `Merge`.
            size: As in `Merge`.
            added: As in `Merge`.
            unfold: As in `Merge`.
        """
        return Merge(index, assign, values, size, added, unfold)

    @staticmethod
    def mix(x: Tensor, weights: Tensor) -> Mix:
        """Soft merging: each new token is a weighted sum ``weights @ x`` of all tokens.

        It gets the position of the token with the largest weight. Where original positions are
        restored, they get the transposed weights times the new tokens, with rows that sum to one.

        Args:
            x: The tokens, ``[B, n, C]``.
            weights: ``[B, m, n]`` with entries >= 0.

        Raises:
            InvalidType: The shape of ``weights`` does not fit.

        >>> x = torch.tensor([[[1.0], [3.0], [5.0]]])
        >>> Reduction.mix(x, torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])).values.flatten()
        tensor([2., 5.])
        """
        if weights.dim() != 3 or weights.shape[::2] != x.shape[:2]:
            raise InvalidType(
                f"Reduction.mix needs weights [B, m, n] for tokens of shape {tuple(x.shape)} = "
                f"[B, n, C], got {tuple(weights.shape)}; one row for each new token"
            )
        back = weights.float().mT
        total = back.sum(-1, keepdim=True)
        shares = back / torch.where(total > 0, total, 1.0)
        return Mix(
            weights.argmax(-1),
            torch.where(total[..., 0] > 0, weights.argmax(1), -1),
            weights.to(x.dtype) @ x,
            unfold=lambda later: shares.to(later.dtype) @ later,
        )

    @staticmethod
    def weigh(policy: Tensor) -> Policy:
        """Drop nothing, but weight keys by ``policy`` ``[B, n]``, 1 or 0."""
        return Policy(policy)


@dataclass(frozen=True, eq=False)
class Keep(Reduction):
    """Keeps some tokens unchanged and drops the others.

    Attributes:
        index: The tokens to keep, ``[B, m]``.
        fuse: Weights of dropped tokens in a sum that is added as one more token at the end
            (EViT, section 3.2), ``[B, n]``; None to drop them.
    """

    index: Tensor
    fuse: Tensor | None = None

    def apply(self, state: TokenState, x: Tensor) -> Reduced:
        index = self.index if state.reduced else _by_tiles(self.index, state)
        remaining, before = take(x, _with_prefix(index, state.prefix)), x.shape[1] - state.prefix
        if self.fuse is None or index.shape[1] == before:
            return state.advance(ReductionStep(index, None, before)), remaining
        step, fused = _fuse(index, self.fuse, x[:, state.prefix :])
        return state.advance(step), torch.cat([remaining, fused], dim=1)


@dataclass(frozen=True, eq=False)
class KeepRagged(Reduction):
    """Keeps a different number of tokens in each image.

    Attributes:
        mask: ``[B, n]``, True for tokens to keep.
        fuse: As in `Keep`.
    """

    mask: Tensor
    fuse: Tensor | None = None

    def by_image(self) -> list[KeepRagged]:
        """One reduction for each image."""
        fuse = [None] * len(self.mask) if self.fuse is None else list(self.fuse[:, None])
        return [KeepRagged(*part) for part in zip(self.mask[:, None], fuse, strict=True)]

    def apply(self, state: TokenState, x: Tensor) -> Reduced:
        if x.device.type == "meta":  # a dry run has no values, so all tokens are kept
            index = torch.arange(self.mask.shape[1], device=x.device)[None]
        else:
            index = self.mask[0].nonzero().flatten()[None]
        return Keep(index, self.fuse).apply(state, x)


@dataclass(frozen=True, eq=False)
class Merge(Reduction):
    """Turns each cluster of tokens into one token.

    Attributes:
        index: The earlier token whose position each new token gets, ``[B, m]``.
        assign: The new token that each earlier one is merged into, -1 if dropped, ``[B, n]``; or a
            function that returns it.
        values: Values of the new tokens, ``[B, m, C]``; None for those of the tokens at ``index``.
        size: Number of patches merged into each new token, ``[B, m]``.
        added: Indices of new tokens and rows to add to them, ``([B, r], [B, r, C])``: to merge few
            tokens into many without computing all means.
        unfold: Function from the new tokens' later values ``[B, m, C]`` to values of the earlier
            tokens ``[B, n, C]``, used to restore original positions; None gives each the value of
            the token that it was merged into.
    """

    index: Tensor
    assign: Assign
    values: Tensor | None = None
    size: Tensor | None = None
    added: tuple[Tensor, Tensor] | None = None
    unfold: Unfold | None = None

    def apply(self, state: TokenState, x: Tensor) -> Reduced:
        state = state.advance(self.step(x.shape[1] - state.prefix), self.size)
        if self.values is not None:
            return state, torch.cat([x[:, : state.prefix], self.values], dim=1)
        merged = take(x, _with_prefix(self.index, state.prefix))
        if self.added is not None:
            into, rows = self.added
            into = (into + state.prefix)[..., None].expand_as(rows)
            # in place: `merged` is a new tensor, and no gradient needs its earlier values
            merged = merged.scatter_add_(1, into, rows.to(merged.dtype))
        return state, merged

    def step(self, before: int) -> ReductionStep:
        """The record of this reduction of ``before`` tokens."""
        return ReductionStep(self.index, self.assign, before, unfold=self.unfold)


@dataclass(frozen=True, eq=False)
class Merged(Merge):
    """A merge that was applied already, prefix tokens included.

    Attributes:
        sequence: The new sequence, ``[B, P + m, C]``.
        logs: The logarithm of its sizes, ``[B, 1, 1, P + m]``.
    """

    sequence: Tensor = None  # type: ignore[assignment]
    logs: Tensor | None = None

    def apply(self, state: TokenState, x: Tensor) -> Reduced:
        step = self.step(x.shape[1] - state.prefix)
        return state.advance(step, self.size, self.logs), self.sequence


@dataclass(frozen=True, eq=False)
class Mix(Merge):
    """A merge whose new tokens are weighted sums of all tokens, so none stands for one patch."""

    def step(self, before: int) -> ReductionStep:
        # recorded like fused tokens, which do not stand for an original token either
        return ReductionStep(-1 - self.index, self.assign, before, fused=True, unfold=self.unfold)


@dataclass(frozen=True, eq=False)
class Policy(Reduction):
    """Drops nothing, but weights keys by a learned score; for training.

    Attributes:
        policy: ``[B, n]``, 1 or 0, with gradient.
    """

    policy: Tensor

    def apply(self, state: TokenState, x: Tensor) -> Reduced:
        return replace(state, policy=self.policy), x


def _by_tiles(index: Tensor, state: TokenState) -> Tensor:
    """Reorder the kept tokens tile by tile, if there are enough for attention in tiles.

    Once tokens are missing, the grid no longer tells which are neighbours; from then on, tiles are
    runs of the sequence. Later reductions keep this order.
    """
    if state.n_original < TILE_FROM:
        return index
    rank = geometry.table(geometry.nested_rank, state.grid, *COMPACT_RUNS, device=index.device)
    return index.gather(1, rank[index].argsort(dim=1))


def _fuse(index: Tensor, weights: Tensor, x: Tensor) -> tuple[ReductionStep, Tensor]:
    """The fused token ``[B, 1, C]``: the sum of dropped tokens, not normalised (EViT, 3.2).

    It gets the position of the token with the largest weight.
    """
    dropped = weights.scatter(1, index, 0.0)
    extra = (dropped[:, None].to(x.dtype) @ x).to(x.dtype)
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    assign = torch.full_like(dropped, index.shape[1], dtype=torch.long).scatter(1, index, place)
    signed = torch.cat([index, -1 - dropped.argmax(1, keepdim=True)], dim=1)
    return ReductionStep(signed, assign, x.shape[1], fused=True), extra


def _with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Sequence indices of all prefix tokens and of these patch tokens, ``[B, P + m]``."""
    lead = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([lead, index + prefix], dim=1)
