"""The attention calls that `tune` measures, and the measurement of kernels on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from sparsiattn.attention import AttentionInputs, Lengths, Pattern, Site, Tile, dense_attention
from sparsiattn.kernels import CallShape, Kernel, Work, refusals
from sparsiattn.kernels.planning_work import planning_of
from sparsiattn.kernels.prices import DENSE, MASKED, PLANNING
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.registry import REGISTRY
from sparsiattn.runtime import Timing, timing
from sparsiattn.strategies import Connectivity, finish

# The slowest kernels write complete matrices of logits. They are not measured above this number of
# logits, nor is dense attention with a mask.
MOST_LOGITS = 2 << 20
# Batch size multiplier on a GPU, which one image does not keep busy.
GPU_BATCH = 8


@dataclass(frozen=True)
class Case:
    """One attention call to measure.

    Attributes:
        tokens: Number of patches; there is a class token in addition.
        k: Budget of `connectivity`; None for images of different lengths in one packed sequence.
        tile: Rows and columns of queries that share their keys.
        heads: Number of attention heads.
        dim: Channels of a query and a key.
        batch: Number of images.
    """

    tokens: int
    k: float | None
    tile: Tile = 1
    heads: int = 6
    dim: int = 64
    batch: int = 1


# Random prices that were fitted to times of these cases with 8 % noise predicted the times of all
# cases below and of eight others with a mean error of 4 %, as well as 15 cases did.
QUICK = (
    Case(196, 0.25, (7, 7)),
    Case(196, 0.25),
    Case(576, 0.25, (8, 8)),
    Case(1024, 0.1, (8, 4), dim=32),
    Case(1024, 0.1, (8, 4)),
    Case(196, 0.25, (7, 7), batch=8),
    Case(4096, 0.1, (16, 8), heads=3),
    Case(1024, 0.5, (16, 16)),
    Case(196, None, batch=8),
)
MORE = (
    Case(576, 0.1),
    Case(1024, 0.25, (8, 4)),
    Case(1024, 0.1, (8, 4), heads=12),
    Case(1024, 0.1, (8, 4), batch=4),
    Case(2304, 0.1, (8, 8)),
    Case(4096, 0.1, (8, 8)),
    Case(4096, 0.1, (16, 8)),
    Case(4096, 0.25, (8, 8)),
    Case(196, 0.1, batch=8),
    Case(784, 0.1, (7, 7), heads=3),
    Case(784, 0.5, (7, 7), heads=3),
    Case(2304, 0.25, (16, 16), heads=12),
    Case(4096, 0.5, (16, 16)),
    Case(4096, 0.05, (16, 16)),
    Case(4096, 0.1, (8, 8), heads=16, dim=80),
    Case(9216, 0.1, (8, 8)),
    Case(9216, 0.1, (16, 16)),
    Case(784, None, batch=8),
)


@dataclass(frozen=True)
class Measured:
    """The time of one kernel for one `Case`.

    Attributes:
        case: The attention call.
        dtype: Data type, as ``"float32"``.
        kernel: Name of the kernel, or ``"dense"``, ``"masked"`` (dense attention with an additive
            mask) or ``"planning"``.
        seconds: Median time in seconds.
        ratio: Dense time divided by this time, the median of paired runs.
        work: Work of the kernel; None if it does not declare it.
        expected: ``ratio`` as predicted by the fitted prices; None if not predicted.
    """

    case: Case
    dtype: str
    kernel: str
    seconds: float
    ratio: float
    work: Work | None
    expected: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def sized(case: Case, device: torch.device) -> Case:
    grows = device.type != "cpu" and case.k is not None
    return replace(case, batch=case.batch * GPU_BATCH) if grows else case


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Failure:
    """A call that raised while it was measured.

    Attributes:
        case: The attention call.
        dtype: Data type, as ``"float32"``.
        kernel: As in `Measured`.
        error: The error in one line.
        pairs: Number of (query, key) pairs, over all heads and images, from which on the kernel is
            considered failing: that of the case if memory was too small, 0 for any other error.
    """

    case: Case
    dtype: str
    kernel: str
    error: str
    pairs: int = 0

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, kernel: str, error: Exception) -> Failure:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # the CPU's allocator raises a plain RuntimeError
        out_of_memory = out_of_memory or "allocate memory" in message
        pairs = case.batch * case.heads * case.tokens**2 if out_of_memory else 0
        return cls(case, dtype_name(dtype), kernel, message, pairs)


Outcome = tuple[list[Measured], list[Failure]]
"""Measurements, and calls that raised."""


def measure(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    limit: float = math.inf,
    *,
    compiles: bool = True,
) -> Outcome:
    """Measure one case: dense attention, with a mask, planning, and each kernel that supports it.

    Args:
        case: The attention call.
        device: Device of the call.
        dtype: Data type of its operands.
        rounds: Largest number of paired runs.
        limit: Time limit in seconds, see `timing.alternate_within`.
        compiles: Whether to measure kernels that compile for every shape first.
    """
    with torch.inference_mode():
        try:
            inputs, plan, planning = _prepare(case, device, dtype)
            pattern = plan()
        except Exception as error:  # for example, too little memory for these shapes
            return [], [Failure.of(case, dtype, PLANNING, error)]
        dense = CallShape.of(inputs).dense
        ways: dict[str, Way] = {DENSE: Way(_dense(inputs), lambda: (dense, None))}
        if planning is not None:
            ways[PLANNING] = Way(plan, lambda: (planning, None))
        if case.k is not None and _logits(inputs) <= MOST_LOGITS:
            ways[MASKED] = Way(_dense(_masked(inputs)), lambda: (dense, None))
        for kernel in _kernels(inputs, pattern, compiles):
            ways[kernel.name] = Way(
                partial(kernel, inputs, pattern), partial(_declared, kernel, inputs, pattern)
            )
        return _timed(ways, case, dtype, rounds, limit)


class Way(NamedTuple):
    """One way to compute a case.

    Attributes:
        run: Computes the case once.
        declared: Returns the work and the expected speed that the kernel declares.
    """

    run: Callable[[], Any]
    declared: Callable[[], tuple[Work | None, float | None]]


def _timed(
    ways: dict[str, Way], case: Case, dtype: torch.dtype, rounds: int, limit: float
) -> Outcome:
    calls = {name: way.run for name, way in ways.items()}
    sampled = timing.alternate_within(calls, rounds, limit)
    failed = [Failure.of(case, dtype, name, error) for name, error in sampled.failed.items()]
    rows: list[Measured] = []
    for name, seconds in sampled.times.items() if DENSE in sampled.times else ():
        try:
            declared = ways[name].declared()
        except Exception as error:
            failed.append(Failure.of(case, dtype, name, error))
            continue
        paired = Timing.of(seconds, sampled.times[DENSE][: len(seconds)])
        took, ratio = paired.first.median, paired.ratio.median
        rows.append(Measured(case, dtype_name(dtype), name, took, ratio, *declared))
    return rows, failed


def _declared(
    kernel: Kernel, inputs: AttentionInputs, pattern: Pattern
) -> tuple[Work | None, float | None]:
    return kernel.work(inputs, pattern), kernel.speed(inputs, pattern)


def _dense(inputs: AttentionInputs) -> Callable[[], Any]:
    operands = inputs.q, inputs.k, inputs.v, inputs.bias
    return partial(dense_attention, *operands, scale=inputs.scale)


def _masked(inputs: AttentionInputs) -> AttentionInputs:
    """The call with an additive mask shared by all images, like a position bias."""
    shape = (1, inputs.q.shape[1], inputs.n_queries, inputs.n_keys)
    return inputs.replace(bias=torch.zeros(shape, device=inputs.device, dtype=inputs.q.dtype))


def _logits(inputs: AttentionInputs) -> int:
    return inputs.q.shape[:2].numel() * inputs.n_queries * inputs.n_keys


def _prepare(
    case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[AttentionInputs, Callable[[], Pattern], Work | None]:
    """Random operands, the function that plans for them, and the work of planning."""
    lengths = tuple(case.tokens * (8 + i % 8) // 16 for i in range(case.batch))
    batch, rows = (1, sum(lengths)) if case.k is None else (case.batch, case.tokens + 1)
    shape = (3, batch, rows, case.heads, case.dim)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v = qkv.transpose(2, 3).unbind(0)  # views of one projection, as in most hosts
    site = Site.of(q, k, v, prefix_tokens=0 if case.k is None else 1)
    inputs = AttentionInputs(q, k, v, case.dim**-0.5, None, site)
    if case.k is None:
        packed = Lengths(rows, rows, lengths)
        return inputs, lambda: packed, None
    strategy = Connectivity(k=case.k, tile=case.tile)
    inputs = inputs.replace(tile=case.tile, block=strategy.block_for(site.keys))
    planner = strategy.planner(site).to(device, dtype)
    background = strategy.background_for(inputs.key_grid, inputs.key_views)
    with mac_counter() as counter:
        planned = planner(inputs)
        finish(planned, inputs, background=background)  # counts the votes
    work = planning_of(planned, macs_of(counter), inputs).work
    return inputs, lambda: finish(planner(inputs), inputs, background=background), work


def _kernels(inputs: AttentionInputs, pattern: Pattern, compiles: bool) -> list[Kernel]:
    """Kernels that support the call, without those whose matrices of logits would be too large.

    ``auto`` takes no kernel that would have to compile first, so such kernels may be left out.
    """
    skipped: set[str] = {"reference", "sdpa"} if _logits(inputs) > MOST_LOGITS else set()
    if isinstance(pattern, Lengths):  # sdpa runs image by image here
        skipped -= {"sdpa"}
    return [
        kernel
        for kernel in REGISTRY.all("kernels").values()
        if kernel.name not in skipped
        and not refusals(kernel, inputs, pattern)
        and (compiles or not kernel.not_ready(inputs, pattern))
    ]
