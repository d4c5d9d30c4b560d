"""Parts of attention predictors: exact attention rows as targets, and tables of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sparsiattn.attention.derivatives import is_transformed
from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.strategies.base import is_number
from sparsiattn.strategies.basis import own_keys, padded_shares, resize_tables

MAX_ELEMENTS = 1 << 24  # elements of exact attention that calibration computes at once
PART = 1 << 8  # elements of a table that are compared in one call

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def exact_rows(inputs: AttentionInputs) -> Tensor:
    """The exact attention of every row to each key, or to each block, ``[B, H, R, n]``.

    Computed for a few rows at a time, so that there is no ``N x N`` tensor if there are tiles.
    """
    tiles = inputs.tiles
    if tiles is None:
        queries = torch.arange(inputs.n_queries - inputs.prefix, device=inputs.q.device)
        rows, weight = queries.unsqueeze(-1), torch.ones_like(queries.unsqueeze(-1))
    else:
        rows, weight = tiles.order, tiles.weight
    per_row = inputs.q.shape[:-2].numel() * rows.shape[1] * inputs.n_keys
    at_once = max(1, MAX_ELEMENTS // per_row)
    parts = zip(rows.split(at_once), weight.split(at_once), strict=True)
    return torch.cat([_rows_of(inputs, *part) for part in parts], dim=-2)


def _rows_of(inputs: AttentionInputs, rows: Tensor, weight: Tensor) -> Tensor:
    exact = inputs.logits(rows.flatten() + inputs.prefix).softmax(-1).nan_to_num(0.0)
    share = weight.to(exact.dtype).unsqueeze(-1)
    target: Tensor = (exact.unflatten(-2, rows.shape) * share).sum(-2)
    if inputs.blocks is None:
        return target
    shares = inputs.blocks.mean(target[..., inputs.prefix :].mT).mT
    return shares / shares.sum(-1, keepdim=True).clamp_min(1e-6)


class KnownTables:
    """Detects whether W_down and W_up hold known values.

    They are compared after every write that autograd's version counter shows. Writes to
    ``weight.data`` do not change it. Therefore on a CPU each call also compares a part of the
    values, one part after the other (all of them would not fit the caches beside a model's
    weights). On other devices a comparison would synchronise.

    Args:
        make: Makes the known tables.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._make = make
        self._known: tuple[Tensor, ...] | None = None
        self._last: tuple[object, bool] | None = None
        self._parts: _Parts | None = None

    def __getstate__(self) -> dict[str, Any]:
        return KnownTables(self._make).__dict__

    def equals(self, down: Tensor, up: Tensor) -> bool:
        """Whether the tables are the known ones."""
        on_cpu = down.is_cpu
        if on_cpu and type(down) is not nn.Parameter:  # a DTensor shard has no address
            return self._compare((down, up))
        identity = identity_of(down), identity_of(up)
        if self._last is None or self._last[0] != identity:
            equal = self._compare((down, up))
            self._last, self._parts = (identity, equal), None
            if on_cpu and equal and self._known is not None:
                self._parts = _Parts((*self._known, down, up))
        elif on_cpu and not (self._parts is not None and self._parts.next_equals()):
            self._last = identity, self._compare((down, up))
        return self._last[1]

    def _compare(self, tables: tuple[Tensor, ...]) -> bool:
        full_tables = [whole_tensor(table) for table in tables]
        if self._known is None or self._known[0].dtype != full_tables[0].dtype:
            with torch.inference_mode(False):
                self._known = tuple(t.to(full_tables[0].dtype) for t in self._make())
        pairs = zip(self._known, full_tables, strict=True)
        return all(torch.equal(known.to(now.device), now) for known, now in pairs)


class _Parts:
    """Parts of known and current tables that are quick to compare, one after the other.

    Args:
        tables: The known W_down and W_up, then the current ones.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._tables = [table.detach() for table in tables]
        rows, columns = tables[0].shape
        self._count = max(1, min(rows, rows * columns // PART))
        self._views: dict[int, tuple[Pair, Pair]] = {}
        self._next = 0

    def next_equals(self) -> bool:
        """Whether the next part of both current tables has the known values."""
        self._next = (self._next + 1) % self._count
        views = self._views.get(self._next)
        if views is None:  # made when needed: all of them would take `patch` long
            views = self._views[self._next] = self._part(self._next)
        return all(torch.equal(known, now) for known, now in views)

    def _part(self, index: int) -> tuple[Pair, Pair]:
        with torch.inference_mode(False):
            rows = self._tables[0].shape[0]
            start, end = (rows * i // self._count for i in (index, index + 1))
            known_down, known_up, down, up = (table[start:end] for table in self._tables)
        return (known_down, down), (known_up, up)


class ResizedTables:
    """W_down and W_up resized to another grid than they were made for; caches the last result."""

    def __init__(self) -> None:
        self._last: tuple[object, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the cache can be rebuilt, and its key contains addresses of this process
        return {"_last": None}

    def __call__(
        self, down: Tensor, up: Tensor, old: Grid, new: Grid, prefix: int
    ) -> tuple[Tensor, Tensor]:
        """`resize_tables`, cached."""
        # a cached table has no gradient, and a compiler would make it a constant
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
            return resize_tables(down, up, old, new, prefix)
        key = (new, identity_of(down), identity_of(up))
        if self._last is None or self._last[0] != key:
            # calls outside inference mode could not use tensors that were made in it
            with torch.inference_mode(False):
                tables = resize_tables(down, up, old, new, prefix)
            self._last = key, tables[0].detach(), tables[1].detach()
        return self._last[1:]


def bounded_exp(x: Tensor) -> Tensor:
    """exp with its argument clamped to 30, which float32 can represent."""
    return x.clamp_max(30.0).exp()


def largest(coefficients: Tensor, count: int | None) -> Tensor:
    """The ``count`` largest entries of every row, zero elsewhere; all if ``count`` is None."""
    if count is None or count >= coefficients.shape[-1]:
        return coefficients
    kept = coefficients.topk(count, dim=-1)
    return torch.zeros_like(coefficients).scatter(-1, kept.indices, kept.values)


def number_from(value: object, least: float) -> TypeGuard[float]:
    """Whether an option's value is a number of at least ``least``."""
    return is_number(value) and least <= value < 1e18  # must fit 64 bits


def sizes_above(up: Tensor, threshold: float) -> Tensor:
    """abs(W_up) without its small entries (the authors' inference rule)."""
    size = up.abs()
    return torch.where(size > threshold, size, 0.0) if threshold else size


def for_heads(table: Tensor) -> Tensor:
    """Add a head dimension to ``[B, Nk, K]``; other tables are unchanged."""
    return table.unsqueeze(1) if table.dim() == 3 else table


def without_hidden_keys(down: Tensor, inputs: AttentionInputs) -> Tensor:
    """W_down without keys that no query sees (padding), with the other weights scaled up."""
    visible = inputs.visible_keys
    if visible is None:
        return down
    weights = for_heads(down)
    masked = weights * visible.unsqueeze(-1)
    return masked * (
        weights.abs().sum(-2, keepdim=True) / masked.abs().sum(-2, keepdim=True).clamp_min(1e-6)
    )


def with_own_keys(scores: Tensor, inputs: AttentionInputs, weight: Tensor) -> Tensor:
    """Scores plus a share of a row's total score at the row's own key, or at a tile's own keys.

    Args:
        scores: ``[B, H, R, n]``; may be written to.
        inputs: The operands of the call.
        weight: The share, ``[1]``.
    """
    extra = weight.to(scores.dtype) * scores.sum(-1, keepdim=True)
    if inputs.tiles is None:
        if torch.compiler.is_compiling():  # ONNX cannot write through a view
            here = inputs.table(own_keys, *scores.shape[-2:], inputs.prefix)
            return torch.addcmul(scores, extra, here.to(scores.dtype))
        scores.diagonal(inputs.prefix, -2, -1).add_(extra.squeeze(-1))
        return scores
    before, block = (inputs.prefix, 1) if inputs.blocks is None else (0, inputs.block)
    sizes = inputs.query_grid, inputs.tile, block, inputs.views
    shares = inputs.table(padded_shares, before, scores.dtype, *sizes)
    return torch.addcmul(scores, extra, shares)


def whole_tensor(weight: Tensor) -> Tensor:
    """The full tensor of a weight that FSDP has sharded; other weights are unchanged."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def identity_of(table: Tensor) -> tuple[object, ...]:
    """A key that changes with the values; inference tensors have no version counter."""
    version = 0 if table.is_inference() else table._version
    return table.data_ptr(), version, table.dtype, table.device
