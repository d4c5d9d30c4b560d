"""Cost model: the expected time of dense attention, of each kernel and of planning.

The cost follows from shapes only. `Work` counts what a call does (operations, multiply-accumulates,
logits, bytes moved), and `Prices` are the seconds that each of these takes. Prices for CPU and CUDA
are built in; `tune` replaces them with measurements of this machine. This module never measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from sparsiattn.attention.factored_bias import FactoredBias
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern, Ranked
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.compiled import is_loaded

# Prices are stored by kernel name and by these names: dense attention, dense attention with the
# host's mask or bias, and planning.
DENSE, MASKED, PLANNING = "dense", "masked", "planning"

# Time of compiled code for one vote, and for the host's bias of one pair, relative to torch's time
# for one score to choose from: 1.6e-9 and 0.8e-9 s of 1.3e-8 s, at 1,024 to 4,096 tokens on a Xeon
# with AVX-512 under other load. Both are accurate to a factor of about 1.5. `tune` measures votes,
# so its price of planning corrects a wrong VOTE_WORTH, but not a wrong BIAS_WORTH.
VOTE_WORTH, BIAS_WORTH = 0.125, 0.06

# Cost of a softmax entry with a mask relative to one without, in torch's attention, which took 1.1x
# to 1.2x the time on that processor. The built-in prices of MASKED use it; `tune` measures them.
MASK_WORTH = 2.0

# How often a bias is written when it is built: once as a sum, once as a copy in mask layout.
BUILT_WORTH = 2.0

_COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)

SITE_SECONDS = 1.5e-4
"""Python's time per site, on the way to a kernel and back, on a server core.

Most of it is spent waiting for code and objects that other layers have evicted from the caches.
"""

# The batch size for which kernels are compared while a compiler traces.
TRACED_IMAGES = 8


@dataclass(frozen=True)
class Work:
    """The work of one call.

    Attributes:
        calls: Number of operations started, each with its overhead.
        macs: Multiply-accumulates of QK^T and AV, padding included.
        logits: Number of softmax entries; for planning, of scores to choose from.
        bytes: Bytes copied or written besides the operands and the result.
        rows: Number of queries over all heads, each read and written once.

    >>> Work(calls=2, macs=1e6).times(3).macs
    3000000.0
    """

    calls: float = 0.0
    macs: float = 0.0
    logits: float = 0.0
    bytes: float = 0.0
    rows: float = 0.0

    def times(self, factor: float) -> Work:
        """The same number of operations on ``factor`` times as much data."""
        amounts = (amount * factor for amount in (self.macs, self.logits, self.bytes, self.rows))
        return Work(self.calls, *amounts)

    def features(self) -> tuple[float, ...]:
        """The amounts, in the order of the fields of `Prices`."""
        return self.calls, self.macs, self.logits, self.bytes, self.rows


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
class Prices:
    """Seconds of one unit of each kind of `Work`.

    Attributes:
        call: Seconds per operation started.
        mac: Seconds per multiply-accumulate.
        logit: Seconds per softmax entry.
        byte: Seconds per byte copied.
        row: Seconds per query read and written.
    """

    call: float
    mac: float
    logit: float
    byte: float
    row: float = 1e-10

    def of(self, work: Work) -> float:
        """Expected seconds."""
        return (
            self.call * work.calls
            + self.mac * work.macs
            + self.logit * work.logits
            + self.byte * work.bytes
            + self.row * work.rows
        )


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


def masked_prices(dense: Prices) -> Prices:
    """Prices of dense attention with a mask, derived from those without."""
    return replace(dense, logit=MASK_WORTH * dense.logit)


# Fitted to float32 on one and two cores of a Xeon and of an EPYC server (torch 2.15): the geometric
# means of both. (`native` and its planning were fitted on the EPYC and scaled by ratios measured on
# both.) Half precision is assumed to cost the same, except bfloat16 on processors with AMX.
_CPU = {
    DENSE: Prices(2.9e-5, 1.44e-11, 2.53e-10, 1e-10, 1.6e-7),
    PLANNING: Prices(1.4e-5, 5.92e-12, 1.47e-8, 1.5e-11, 1.8e-7),
    "reference": Prices(1.8e-5, 1.45e-12, 3.62e-10, 2.6e-10, 8.1e-9),
    "sdpa": Prices(1.9e-5, 2.38e-12, 2.55e-9, 1.5e-10, 1.5e-8),
    "gather": Prices(7.3e-6, 1.71e-11, 6.81e-10, 2.5e-11, 5.1e-7),
    "native": Prices(1.1e-06, 7.95e-12, 5.17e-10, 1.9e-11, 3.6e-08),
}
_CPU[MASKED] = masked_prices(_CPU[DENSE])
# where the compiled code of `native` also plans
_CPU_COMPILED = {**_CPU, PLANNING: Prices(5.6e-06, 4.78e-12, 1.29e-08, 9.6e-12, 5.1e-08)}
# torch's bfloat16 products with AMX relative to float32: dense attention took 0.42 to 0.54 of the
# time at 197 to 1,370 tokens, on one processor. Compiled code computes and plans in float32, so its
# prices stay. `tune` with bfloat16 among its dtypes replaces all of these.
_AMX_SHARE = 0.45
_BY_TORCH = (DENSE, MASKED, "reference", "sdpa", "gather")
# Rough estimates for an H100, from peak rates and usual launch times; `tune` replaces them.
_CUDA_HALF = {
    DENSE: Prices(1.2e-5, 4.5e-15, 1e-14, 5e-13),
    PLANNING: Prices(7e-6, 2e-14, 8e-12, 1e-12),
    "reference": Prices(8e-6, 5e-14, 2e-11, 1e-12),
    "sdpa": Prices(9e-6, 1.2e-14, 1e-13, 1e-12),
    "gather": Prices(8e-6, 7e-15, 1e-13, 8e-13),
    "varlen": Prices(1.5e-5, 5e-15, 1e-14, 5e-13),
}
_CUDA_HALF[MASKED] = masked_prices(_CUDA_HALF[DENSE])
_CUDA_SINGLE = {
    name: Prices(price.call, price.mac * 8, price.logit * 2, price.byte, price.row)
    for name, price in _CUDA_HALF.items()
}
_TUNED: dict[tuple[torch.device, torch.dtype], dict[str, Prices]] = {}
_FAILED: dict[tuple[torch.device, torch.dtype], dict[str, dict[str, Any]]] = {}
_generation = 0


def shipped(device: torch.device, dtype: torch.dtype) -> dict[str, Prices]:
    """The built-in prices, for machines that were never tuned."""
    if device.type != "cuda":
        table = _CPU_COMPILED if dtype in _COMPILED_TYPES and is_loaded() else _CPU
        return _with_amx(table) if dtype == torch.bfloat16 and _has_amx() else table
    return _CUDA_HALF if dtype.itemsize == 2 else _CUDA_SINGLE


@cache
def _has_amx() -> bool:
    flags = tuning_cache.cpuinfo("flags")
    return flags is not None and "amx_bf16" in flags.split()


def _with_amx(table: dict[str, Prices]) -> dict[str, Prices]:
    return {
        name: replace(
            price,
            mac=_AMX_SHARE * price.mac,
            logit=_AMX_SHARE * price.logit,
            row=_AMX_SHARE * price.row,
        )
        if name in _BY_TORCH
        else price
        for name, price in table.items()
    }


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


def planning(macs: int, scores: int, call: CallShape) -> Planning:
    """The work of choosing the keys of a call.

    Args:
        macs: Multiply-accumulates of the planner.
        scores: Number of scores from which it chooses.
        call: The shape of the call.
    """
    operands = call.batch * call.heads * (call.queries + call.keys) * call.dim
    # a predictor reads queries and keys; a table is only looked up and sorted
    read = operands * call.dtype.itemsize if macs else 0
    rows = call.batch * call.heads * call.queries if macs else 0
    return Planning(Work(60.0 if macs else 15.0, macs, scores, read, rows), call.batch)


def ready(device: torch.device) -> None:
    """Read the tuning file once per device, before a compiler traces code that needs it."""
    if device.type == "meta" or (device, torch.float32) in _TUNED:
        return
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


def reload() -> None:
    """Read prices again, as after `tune`; every active patch then chooses its kernels again."""
    global _generation
    _TUNED.clear()
    _FAILED.clear()
    _generation += 1


def generation() -> int:
    """How often prices have changed in this process."""
    return _generation


def _width(inputs: AttentionInputs) -> int:
    """How many numbers the bias of one query consists of."""
    bias = inputs.bias
    return sum(bias.sides) if isinstance(bias, FactoredBias) else inputs.n_keys


def planning_of(pattern: Pattern, macs: int, inputs: AttentionInputs) -> Planning:
    """The work of choosing the keys of one call, from the planner's pattern and its MACs."""
    scores = pattern.scores.numel() if isinstance(pattern, Ranked) else 0
    if isinstance(pattern, TopLogits) and macs:  # without MACs, the kernel chooses
        scores = pattern.score_count
        if is_loaded() and pattern.votes and inputs.q.dtype in _COMPILED_TYPES:
            # compiled code copies nothing, but reads the host's bias for every query
            bias = 0 if inputs.bias is None else math.prod(inputs.q.shape[:3]) * _width(inputs)
            scores = round(VOTE_WORTH * scores + BIAS_WORTH * bias)
    return planning(macs, scores, CallShape.of(inputs))
