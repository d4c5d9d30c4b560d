"""What predictors of attention are fitted to and made of: exact rows, and tables of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.strategies.basis import resize_tables

MAX_ELEMENTS = 1 << 24  # of exact attention that calibration holds at once
PART = 1 << 8  # elements of a table that are compared in one call

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def exact_rows(inputs: AttentionInputs) -> Tensor:
    """The exact attention of every row, ``[B, H, R, n]``, or its share in every block.

    From a few rows at a time, so that no ``N x N`` tensor is made where tiles share their keys.
    """
    tiles = inputs.tiles
    if tiles is None:
        alone = torch.arange(inputs.n_queries - inputs.prefix, device=inputs.q.device)
        rows, weight = alone.unsqueeze(-1), torch.ones_like(alone.unsqueeze(-1))
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
    """Whether W_down and W_up hold known values.

    They are compared after every write that autograd counts. Writes to ``weight.data`` leave no
    trace: on a CPU, a part of the values is compared in every call, the next part in the next one
    (all of them are more than the caches hold beside a model's weights). On other devices comparing
    would wait for them.

    Args:
        make: Makes the known tables.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._make = make
        self._known: tuple[Tensor, ...] | None = None
        self._last: tuple[object, bool] | None = None
        self._parts: list[tuple[Pair, ...]] = []
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return KnownTables(self._make).__dict__

    def equals(self, down: Tensor, up: Tensor) -> bool:
        """Whether the tables are the known ones."""
        on_cpu = down.is_cpu
        if on_cpu and type(down) is not nn.Parameter:  # a shard, which has no address
            return self._compare((down, up))
        identity = identity_of(down), identity_of(up)
        if self._last is None or self._last[0] != identity:
            equal = self._compare((down, up))
            self._last, self._parts = (identity, equal), []
            if on_cpu and equal and self._known is not None:
                self._parts = _parts_of(self._known, (down, up))
        elif on_cpu and not self._next_part_equals():
            self._last = identity, self._compare((down, up))
        return self._last[1]

    def _next_part_equals(self) -> bool:
        """Whether the next part of both tables is as known; not where none is known to be."""
        if not self._parts:
            return False
        self._next = (self._next + 1) % len(self._parts)
        return all(torch.equal(known, now) for known, now in self._parts[self._next])

    def _compare(self, tables: tuple[Tensor, ...]) -> bool:
        whole = [whole_tensor(table) for table in tables]
        if self._known is None or self._known[0].dtype != whole[0].dtype:
            with torch.inference_mode(False):
                self._known = tuple(t.to(whole[0].dtype) for t in self._make())
        pairs = zip(self._known, whole, strict=True)
        return all(torch.equal(known.to(now.device), now) for known, now in pairs)


def _parts_of(known: Sequence[Tensor], tables: Sequence[Tensor]) -> list[tuple[Pair, ...]]:
    """Rows of every table beside the known ones, as views, in parts that are quick to compare."""
    count = max(1, tables[0].numel() // PART)
    with torch.inference_mode(False), torch.no_grad():
        split = [table.detach().tensor_split(count) for table in (*known, *tables)]
    return [((d, down), (u, up)) for d, u, down, up in zip(*split, strict=True)]


class ResizedTables:
    """W_down and W_up for another grid than they were made for; the last ones are kept."""

    def __init__(self) -> None:
        self._last: tuple[object, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # they can be made again, and their key holds addresses of this process
        return {"_last": None}

    def __call__(
        self, down: Tensor, up: Tensor, old: Grid, new: Grid, prefix: int
    ) -> tuple[Tensor, Tensor]:
        """As `resize_tables`."""
        # a kept table has no gradient, and a compiler would bake it in
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return resize_tables(down, up, old, new, prefix)
        key = (new, identity_of(down), identity_of(up))
        if self._last is None or self._last[0] != key:
            # calls outside inference mode could not use tensors that were made in it
            with torch.inference_mode(False):
                tables = resize_tables(down, up, old, new, prefix)
            self._last = key, tables[0].detach(), tables[1].detach()
        return self._last[1:]


def bounded_exp(x: Tensor) -> Tensor:
    """In single precision and bounded: half precision ends at e^11."""
    return x.clamp_max(30.0).exp()


def largest(coefficients: Tensor, count: int | None) -> Tensor:
    """So many largest entries of every row, zero elsewhere; None for all."""
    if count is None or count >= coefficients.shape[-1]:
        return coefficients
    kept = coefficients.topk(count, dim=-1)
    return torch.zeros_like(coefficients).scatter(-1, kept.indices, kept.values)


def sizes_above(up: Tensor, threshold: float) -> Tensor:
    """abs(W_up) without its small entries (the authors' inference rule)."""
    size = up.abs()
    return torch.where(size > threshold, size, 0.0) if threshold else size


def for_heads(table: Tensor) -> Tensor:
    """``[B, Nk, K]`` with an axis for heads, others as they are."""
    return table.unsqueeze(1) if table.dim() == 3 else table


def without_hidden_keys(down: Tensor, inputs: AttentionInputs) -> Tensor:
    """W_down without keys that no query sees (padding), the others making up for them."""
    visible = inputs.visible_keys
    if visible is None:
        return down
    every = for_heads(down)
    left = every * visible.unsqueeze(-1)
    return left * (
        every.abs().sum(-2, keepdim=True) / left.abs().sum(-2, keepdim=True).clamp_min(1e-6)
    )


def whole_tensor(weight: Tensor) -> Tensor:
    """All of a weight that FSDP has sharded; others as they are."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def identity_of(table: Tensor) -> tuple[object, ...]:
    """What tells these values from others: tensors of inference mode count no versions."""
    version = 0 if table.is_inference() else table._version
    return table.data_ptr(), version, table.dtype, table.device
