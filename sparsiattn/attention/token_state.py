"""Which tokens a forward pass still carries, and what became of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_tracing
from sparsiattn.attention.geometry import Grid

Assign = Tensor | Callable[[], Tensor] | None
Unfold = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ReductionStep:
    """The record of one reduction from ``n`` to ``m`` patch tokens.

    Attributes:
        index: ``[B, m]``, the earlier token that each token stands for; a fused token is stored
            as ``-1 - index``.
        assign: ``[B, n]``, the new position of each earlier token, -1 if dropped, or a function
            that computes it; None if it follows from ``index``.
        before: Number of tokens before the reduction, n.
        fused: Whether any token is a fused one.
        unfold: Function from ``[B, m, C]`` to ``[B, n, C]``; None where each earlier token gets
            the value of the token that ``assign`` names.
    """

    index: Tensor
    assign: Assign
    before: int
    fused: bool = False
    unfold: Unfold | None = None

    def targets(self) -> Tensor:
        """The new position of every earlier token, -1 if it is gone, ``[B, n]``."""
        if self.assign is not None:
            return self.assign if isinstance(self.assign, Tensor) else self.assign()
        place = torch.arange(self.index.shape[1], device=self.index.device)
        gone = self.index.new_full((self.index.shape[0], self.before), -1)
        return gone.scatter(1, self.index, place.expand_as(self.index))

    def unfolded(self, x: Tensor) -> Tensor:
        """The value for every earlier token, ``[B, n, C]``; for dropped ones it has no meaning.

        Args:
            x: The tokens after the reduction, ``[B, m, C]``.
        """
        if self.unfold is not None:
            return self.unfold(x)
        return x.gather(1, self.targets().clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True, eq=False)
class TokenState:
    """The patch tokens of one forward pass; prefix and suffix tokens are not counted.

    Attributes:
        owner: Key of the patch.
        prefix: Number of special tokens before the patches.
        suffix: Number of special tokens after the patches.
        grid: Rows and columns of all patch tokens at this resolution.
        layer: Index of the next block.
        ids: ``[B, n]``, the original patch that each token stands for (a fused token is stored as
            ``-1 - id``); None before the first reduction.
        size: ``[B, n]``, number of patches merged into each token; None if all are 1.
        logs: The logarithm of ``size``, ``[B, 1, 1, P + n]``, where it is known already.
        steps: The reductions so far.
        policy: ``[B, n]``, 1 for kept and 0 for dropped tokens, with gradient, while a learned
            score trains.
        last: ``[B, n0, C]``, the last value of every original token, stored where original
            positions will be restored.
        sequence: The short sequence for the next block, where the host was given another tensor.
        returned: The tensor that the host got after the last block.
    """

    owner: int
    prefix: int
    grid: Grid
    layer: int = 0
    ids: Tensor | None = None
    size: Tensor | None = None
    steps: tuple[ReductionStep, ...] = ()
    policy: Tensor | None = None
    last: Tensor | None = None
    sequence: Tensor | None = None
    returned: Tensor | None = None
    suffix: int = 0
    logs: Tensor | None = None

    @property
    def n_original(self) -> int:
        """Number of patch tokens before any reduction."""
        return self.grid[0] * self.grid[1]

    @property
    def reduced(self) -> bool:
        """Whether any reduction took place."""
        return len(self.steps) > 0  # Dynamo of torch 2.10 cannot trace bool() of a tuple

    def bare(self) -> TokenState:
        """The same without activations, which still tells what became of every token."""
        steps = self.steps
        if any(step.unfold is not None for step in steps):
            steps = tuple(replace(step, unfold=None) for step in steps)
        return replace(self, sequence=None, returned=None, last=None, steps=steps)

    def advance(
        self, step: ReductionStep, size: Tensor | None = None, logs: Tensor | None = None
    ) -> TokenState:
        """The state after a reduction.

        Args:
            step: The record of the reduction.
            size: The new sizes ``[B, m]``; None if tokens keep theirs.
            logs: The logarithm of the new sizes, ``[B, 1, 1, P + m]``, where it is known.
        """
        index = unsigned(step.index) if step.fused else step.index
        ids = index if self.ids is None else self.ids.gather(1, index)
        if step.fused:
            ids = torch.where(step.index < 0, -1 - unsigned(ids), ids)
        if size is None and self.size is not None:
            size = self.size.gather(1, index)
        return replace(self, ids=ids, size=size, logs=logs, steps=(*self.steps, step))

    def positions(self) -> Tensor:
        """The original patch whose position each token has, ``[B, n]``."""
        assert self.ids is not None
        return unsigned(self.ids)

    def source(self) -> Tensor:
        """The current position of every original patch token, -1 if it is gone, ``[B, n0]``."""
        place = self.steps[0].targets()
        for step in self.steps[1:]:
            moved = step.targets().gather(1, place.clamp_min(0))
            place = torch.where(place >= 0, moved, -1)
        return place

    def rows(self, table: Tensor) -> Tensor:
        """Rows of a table for the current tokens; a merged token gets the mean over its patches.

        Args:
            table: One row for each original patch, ``[n0, K]``.

        Returns:
            ``[B, n, K]``, or ``[1, n, K]`` before the first reduction.
        """
        if self.ids is None:
            return table[None]
        if all(step.assign is None for step in self.steps):
            return table[self.positions()]
        place, batch = self.source(), self.ids.shape[0]
        flat = table.expand(batch, -1, -1)
        into = torch.where(place >= 0, place, self.ids.shape[1])[..., None]
        empty = flat.new_zeros(batch, self.ids.shape[1] + 1, flat.shape[-1])
        total = empty.scatter_add(1, into.expand_as(flat), flat)[:, :-1]
        count = empty[..., :1].scatter_add(1, into, torch.ones_like(flat[..., :1]))[:, :-1]
        return total / count.clamp_min(1)

    def fit_mask(self, mask: Tensor) -> Tensor:
        """A host mask reduced to the current tokens.

        Args:
            mask: Over all tokens, ``[..., N0, N0]`` or ``[..., 1, N0]``; a mask of another size is
                returned unchanged.

        Returns:
            ``[B, H|1, N, N]`` or ``[B, H|1, 1, N]``.
        """
        full = self.prefix + self.n_original + self.suffix
        if self.ids is None or mask.shape[-1] != full or self.n_original == self.ids.shape[1]:
            return mask
        if mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        keep = self.tokens()
        mask = mask.expand(keep.shape[0], *mask.shape[1:])
        columns = keep[:, None, None, :]
        if mask.shape[-2] == full:
            rows = keep[:, None, :, None].expand(*mask.shape[:2], -1, full)
            mask = mask.gather(-2, rows)
        return mask.gather(-1, columns.expand(*mask.shape[:-1], -1))

    def fit_side(self, table: Tensor) -> Tensor:
        """A block's argument reduced to the current tokens.

        Args:
            table: A table with one row per patch (RoPE: ``[..., n0, D]``); any other tensor is
                returned unchanged.
        """
        if self.ids is None or not self.is_side(table):
            return table
        positions = self.positions()
        if table.dim() == 2:
            return table[positions][:, None]
        table = table if table.dim() == 4 else table[None]
        index = positions[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1])
        return table.expand(positions.shape[0], -1, -1, -1).gather(2, index)

    def is_side(self, table: Tensor) -> bool:
        """Whether a block's argument is a table with one row for each original patch."""
        if not 2 <= table.dim() <= 4 or table.shape[-2] != self.n_original:
            return False
        # a bias over pairs of tokens is reduced where it is used
        return table.dim() == 2 or table.shape[-1] != self.n_original

    def restore_sequence(self, x: Tensor, how: str) -> Tensor:
        """The sequence with every original position restored, ``[B, N0, C]``.

        Special tokens stay around the patches; see `restore_patches`.
        """
        body, suffix = self.split_suffix(x)
        patches = self.restore_patches(body[:, self.prefix :], how)
        return torch.cat([body[:, : self.prefix], patches, suffix], dim=1)

    def split_suffix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split ``[B, N, C]`` into the tokens before the suffix and the suffix tokens."""
        end = x.shape[1] - self.suffix
        return x[:, :end], x[:, end:]

    def tokens(self) -> Tensor:
        """Original positions of the current tokens, special tokens included, ``[B, N]``."""
        positions, first_suffix = self.positions(), self.prefix + self.n_original
        prefix, suffix = (
            torch.arange(start, start + count, device=positions.device).expand(
                positions.shape[0], -1
            )
            for start, count in ((0, self.prefix), (first_suffix, self.suffix))
        )
        return torch.cat([prefix, positions + self.prefix, suffix], dim=1)

    def log_size(self, dtype: torch.dtype) -> Tensor | None:
        """The log of each key's size, ``[B, 1, 1, N]``, zero for special tokens.

        Added to the logits, this is proportional attention (ToMe, section 3, eq. 1).
        """
        if self.size is None:
            return None
        if self.logs is not None and not self.suffix and self.logs.dtype == dtype:
            return self.logs
        log = self.size.log().to(dtype)
        return torch.nn.functional.pad(log, (self.prefix, self.suffix))[:, None, None, :]

    def remember(self, x: Tensor) -> TokenState:
        """A state that stores the current patch tokens ``[B, n, C]`` as their last values."""
        return replace(self, last=self.restore_patches(x, "scatter"))

    def restore_patches(self, x: Tensor, how: str) -> Tensor:
        """Fill every original position with a token.

        Args:
            x: The current patch tokens, ``[B, n, C]``.
            how: ``"unfold"`` gives a merged or fused patch its cluster's token (or the result of
                the strategy's own `Reduction.unfold`), ``"scatter"`` writes each token only to the
                position that it stands for. Both fill the other positions with their last values.

        Returns:
            ``[B, n0, C]``.
        """
        if not self.steps or self.ids is None:
            return x
        place = self.source()
        if how == "scatter":
            stands_for = self.ids.gather(1, place.clamp_min(0))
            original = torch.arange(self.n_original, device=place.device)
            place = torch.where(stands_for == original, place, -1)
        values = self._unfolded(x, place, how)
        last = 0.0 if self.last is None else self.last.to(x.dtype)
        return torch.where(place[..., None] >= 0, values, last)

    def _unfolded(self, x: Tensor, place: Tensor, how: str) -> Tensor:
        if how == "unfold" and any(step.unfold for step in self.steps):
            for step in reversed(self.steps):
                x = step.unfolded(x)
            return x
        return x.gather(1, place.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))


def unsigned(index: Tensor) -> Tensor:
    """Indices without the mark of fused tokens (``-1 - index``)."""
    return torch.where(index < 0, -1 - index, index)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Select the rows ``index`` ``[B, m]`` of ``[B, N, C]``, with one flat gather."""
    # a recorded program must serve other batch sizes than its example's
    recorded = torch.compiler.is_compiling() or is_tracing()
    if not recorded and x.shape[0] == 1:
        return x[0].index_select(0, index[0])[None]
    b, n, c = x.shape
    base = torch.arange(b, device=x.device)[:, None] * n
    return x.reshape(b * n, c).index_select(0, (index + base).flatten()).view(b, index.shape[1], c)
