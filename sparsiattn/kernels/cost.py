"""Cost model: the expected time of dense attention, of each kernel and of planning.

The cost follows from shapes only. `Work` counts what a call does (operations, multiply-accumulates,
logits, bytes moved), and `Prices` are the seconds that each of these takes. Prices of CPUs are
measurements of other machines, those of GPUs come from data sheets (`gpu_prices`); `tune` replaces
both with measurements of this machine. This module never measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsiattn.attention.factored_bias import FactoredBias
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.kernels import gpu_prices, tuning_cache
from sparsiattn.kernels.prices import (
    DENSE,
    MASKED,
    PLANNING,
    Prices,
    Work,
    cpu_prices,
    masked_prices,
)

# How often a bias is written when it is built: once as a sum, once as a copy in mask layout.
BUILT_WORTH = 2.0

SITE_SECONDS = 1.5e-4
"""Python's time per site, on the way to a kernel and back, on a server core.

Most of it is spent waiting for code and objects that other layers have evicted from the caches.
"""

# Operations of planning by a predictor and by a table; on a GPU kernels launched by second calls,
# which `tests/kernels/test_launches.py` counts.
_CPU_CALLS, _GPU_CALLS = (60.0, 15.0), (36.0, 7.0)

# The batch size for which kernels are compared while a compiler traces.
TRACED_IMAGES = 8


@dataclass(frozen=True)
class Planning:
    """The work of choosing keys.

    Attributes:
        work: The work for ``batch`` images.
        batch: Number of images, or of windows.
    """

    work: Work
    batch: int

    def at(self, batch: int) -> Work:
        """The work for another number of images.

        A planner without MACs reads its keys from a table that all images share, so its work does
        not grow.
        """
        return self.work.times(batch / self.batch) if self.work.macs else self.work

    def share(self, call: CallShape) -> float:
        """Expected time as a share of the time of dense attention."""
        return prices(PLANNING, call).of(self.at(call.batch)) / dense_seconds(call)


@dataclass(frozen=True)
class CallShape:
    """Shape of one attention call.

    Attributes:
        batch: Number of images, or of windows.
        heads: Number of query heads.
        queries: Rows of q, ``[batch, heads, queries, dim]``.
        keys: Rows of k, ``[batch, heads, keys, dim]``.
        dim: Channels of a head's queries and keys.
        value_dim: Channels of v, ``[batch, heads, keys, value_dim]``.
        dtype: Dtype of the operands.
        device: Device of the call; in a dry run, the device that it would run on.
        biased: Whether the host adds a mask or a bias.
        built: Whether the host builds a bias that a sparse kernel need not build; see
            `FactoredBias`.

    >>> call = CallShape(1, 6, 197, 197, 64, 64, torch.float32, torch.device("cpu"))
    >>> call.attending(pairs=197 * 20).macs / call.dense.macs  # 20 of 197 keys
    0.10152284263959391
    """

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    biased: bool = False
    built: bool = False

    @classmethod
    def of(cls, inputs: AttentionInputs) -> CallShape:
        q, v = inputs.q, inputs.v
        batch, heads, queries, dim = q.shape
        if torch.compiler.is_compiling():  # the program serves any batch size
            batch = TRACED_IMAGES * inputs.site.windows
        keys, value_dim = v.shape[-2:]
        masks = inputs.bias is not None, isinstance(inputs.bias, FactoredBias)
        return cls(batch, heads, queries, keys, dim, value_dim, q.dtype, inputs.device, *masks)

    def attending(self, pairs: float, *, calls: float = 1.0, moved: float = 0.0) -> Work:
        """The work of attention.

        Args:
            pairs: Number of (query, key) pairs of each image and head.
            calls: Number of operations started.
            moved: Bytes copied.
        """
        each = self.batch * self.heads
        macs = each * pairs * (self.dim + self.value_dim)
        return Work(calls, macs, each * pairs, moved, each * self.queries)

    def rows_bytes(self, rows: float) -> float:
        """Bytes of ``rows`` keys and their values, over all images and heads."""
        row = (self.dim + self.value_dim) * self.dtype.itemsize
        return self.batch * self.heads * rows * row

    @property
    def dense(self) -> Work:
        """The work of dense attention, including that of building the host's bias."""
        pairs = self.queries * self.keys
        built = BUILT_WORTH * self.batch * self.heads * pairs * self.dtype.itemsize
        return self.attending(pairs, moved=built if self.built else 0.0)


_TUNED: dict[tuple[torch.device, torch.dtype], dict[str, Prices]] = {}
_FAILED: dict[tuple[torch.device, torch.dtype], dict[str, dict[str, Any]]] = {}
_generation = 0


def shipped(device: torch.device, dtype: torch.dtype) -> dict[str, Prices]:
    """The built-in prices, for machines that were never tuned."""
    return gpu_prices.shipped(device, dtype) if device.type == "cuda" else cpu_prices(dtype)


def prices(kernel: str, call: CallShape) -> Prices:
    """Prices of a kernel for this call.

    They are the tuned ones, else the built-in ones, else (for an unknown kernel) those of `gather`.
    """
    tuned = _TUNED.get((call.device, call.dtype))
    if tuned is None and not torch.compiler.is_compiling():
        ready(call.device)
        tuned = _TUNED.get((call.device, call.dtype))
    if tuned is not None and kernel in tuned:
        return tuned[kernel]
    builtin = shipped(call.device, call.dtype)
    return builtin[kernel] if kernel in builtin else builtin["gather"]


def dense_seconds(call: CallShape) -> float:
    """Expected time of the host's dense attention."""
    return prices(MASKED if call.biased else DENSE, call).of(call.dense)


def site_seconds(device: torch.device) -> float:
    """Python's time at a site, in seconds; 0 on devices that run asynchronously."""
    return SITE_SECONDS if device.type in ("cpu", "meta") else 0.0


def speed(kernel: str, work: Work, call: CallShape) -> float:
    """Expected speed of a kernel relative to dense attention."""
    return dense_seconds(call) / prices(kernel, call).of(work)


def planning(macs: int, scores: int, call: CallShape, calls: float | None = None) -> Planning:
    """The work of choosing the keys of a call.

    Args:
        macs: Multiply-accumulates of the planner.
        scores: Number of scores from which it chooses.
        call: The shape of the call.
        calls: Number of operations started; None for those of a predictor or of a table.
    """
    operands = call.batch * call.heads * (call.queries + call.keys) * call.dim
    # a predictor reads queries and keys; a table is only looked up and sorted
    read = operands * call.dtype.itemsize if macs else 0
    rows = call.batch * call.heads * call.queries if macs else 0
    if calls is None:
        predictor, table = _GPU_CALLS if call.device.type == "cuda" else _CPU_CALLS
        calls = predictor if macs else table
    return Planning(Work(calls, macs, scores, read, rows), call.batch)


def ready(device: torch.device) -> None:
    """Read the tuning file once per device, before a compiler traces code that needs it."""
    if device.type == "meta" or (device, torch.float32) in _TUNED:
        return
    if device.type == "cuda":
        gpu_prices.known(device)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        entry = tuning_cache.find(device, dtype)
        measured = {} if entry is None else entry["prices"]
        table = {name: Prices(**price) for name, price in measured.items()}
        if DENSE in table and MASKED not in table:  # no masked call was measured
            table[MASKED] = masked_prices(table[DENSE])
        _FAILED[device, dtype] = {} if entry is None else entry.get("failed", {})
        _TUNED[device, dtype] = table


def failures(kernel: str, call: CallShape) -> list[str]:
    """Why ``auto`` should not take a kernel that raised when `tune` tried it on this machine."""
    if not torch.compiler.is_compiling():  # before compiling, the patch has read the file
        ready(call.device)
    known = _FAILED.get((call.device, call.dtype))
    failed = None if not known else known.get(kernel)
    pairs = call.batch * call.heads * call.queries * call.keys
    if failed is None or pairs < failed["pairs"]:
        return []
    return [
        f"raised when `sparsiattn tune` ran it here: {failed['error']}; run tune again once fixed"
    ]


def is_tuned(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether prices measured on this machine apply."""
    ready(device)
    return bool(_TUNED.get((device, dtype)))


def estimated_from(device: torch.device, dtype: torch.dtype) -> str:
    """The published figures from which prices are derived; empty if these are measured."""
    if device.type != "cuda" or is_tuned(device, dtype):
        return ""
    return gpu_prices.known(device).origin


def reload() -> None:
    """Read prices again, as after `tune`; every active patch then chooses its kernels again."""
    global _generation
    _TUNED.clear()
    _FAILED.clear()
    _generation += 1


def generation() -> int:
    """How often prices have changed in this process."""
    return _generation
