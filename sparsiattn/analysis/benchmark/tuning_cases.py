"""The attention calls that `tune` measures, and how long each way to compute one takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from sparsiattn.attention import AttentionInputs, Lengths, Pattern, Site, Tile, dense_attention
from sparsiattn.kernels import CallShape, Kernel, Work, cost, refusals
from sparsiattn.kernels.cost import DENSE, MASKED, PLANNING
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.registry import REGISTRY
from sparsiattn.runtime import Timing, timing
from sparsiattn.strategies import Connectivity, finish

# The slowest kernels write whole matrices of logits; above this many they are not measured, nor is
# dense attention under a mask of the host.
MOST_LOGITS = 2 << 20
# A GPU is not busy with one image.
GPU_BATCH = 8


@dataclass(frozen=True)
class Case:
    """One attention call to measure.

    Attributes:
        tokens: Patches, beside a CLS token.
        k: Budget of `connectivity`; None for images of different lengths in one packed sequence.
        tile: Queries that share their keys.
        heads: Attention heads.
        dim: Width of a query and a key.
        batch: Images.
    """

    tokens: int
    k: float | None
    tile: Tile = 1
    heads: int = 6
    dim: int = 64
    batch: int = 1


# Prices that are drawn at random and fitted to times of these cases, with noise of 8 %, foretell
# times of all cases below and of eight others to 4 % in the mean: as well as 15 cases did.
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
    """What one kernel took for one `Case`.

    Attributes:
        case: What was measured.
        dtype: Data type, as ``"float32"``.
        kernel: Name of the kernel, or ``"dense"``, ``"masked"`` (dense attention under an additive
            mask) or ``"planning"``.
        seconds: Median time.
        ratio: Dense time over this time, the median of paired runs.
        work: What the kernel does, where it says so.
        expected: ``ratio`` by the prices in force after fitting.
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
        case: What was tried.
        dtype: Data type, as ``"float32"``.
        kernel: As in `Measured`.
        error: What it raised, in words.
        pairs: Queries times keys of all heads and images from which on it counts as failing: all of
            them where memory was too small, 0 for any other error.
    """

    case: Case
    dtype: str
    kernel: str
    error: str
    pairs: int = 0

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, kernel: str, error: Exception) -> Failure:
        in_words = f"{type(error).__name__}: {error}".splitlines()[0]
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # the CPU's allocator raises a plain RuntimeError
        short = out_of_memory or "allocate memory" in in_words
        pairs = case.batch * case.heads * case.tokens**2 if short else 0
        return cls(case, dtype_name(dtype), kernel, in_words, pairs)


Outcome = tuple[list[Measured], list[Failure]]
"""What was timed, and what raised instead."""


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, limit: float = math.inf
) -> Outcome:
    """Times of one case: dense, under a mask, planning, and each kernel that takes it.

    Args:
        case: The call.
        device: Where it runs.
        dtype: Of its operands.
        rounds: Paired runs at most.
        limit: Seconds, see `timing.alternate_within`.
    """
    with torch.inference_mode():
        try:
            inputs, plan, planning = _prepare(case, device, dtype)
            pattern = plan()
        except Exception as error:  # too little memory for these shapes, say
            return [], [Failure.of(case, dtype, PLANNING, error)]
        dense = CallShape.of(inputs).dense
        ways: dict[str, Way] = {DENSE: Way(_dense(inputs), lambda: (dense, None))}
        if planning is not None:
            ways[PLANNING] = Way(plan, lambda: (planning, None))
        if case.k is not None and _logits(inputs) <= MOST_LOGITS:
            ways[MASKED] = Way(_dense(_masked(inputs)), lambda: (dense, None))
        for kernel in _kernels(inputs, pattern):
            ways[kernel.name] = Way(
                partial(kernel, inputs, pattern), partial(_said, kernel, inputs, pattern)
            )
        return _timed(ways, case, dtype, rounds, limit)


class Way(NamedTuple):
    """One way to compute a case.

    Attributes:
        run: Does it once.
        said: Its work, and the speed that it expects of itself.
    """

    run: Callable[[], Any]
    said: Callable[[], tuple[Work | None, float | None]]


def _timed(
    ways: dict[str, Way], case: Case, dtype: torch.dtype, rounds: int, limit: float
) -> Outcome:
    calls = {name: way.run for name, way in ways.items()}
    sampled = timing.alternate_within(calls, rounds, limit)
    failed = [Failure.of(case, dtype, name, error) for name, error in sampled.failed.items()]
    rows: list[Measured] = []
    for name, seconds in sampled.times.items() if DENSE in sampled.times else ():
        try:
            said = ways[name].said()
        except Exception as error:
            failed.append(Failure.of(case, dtype, name, error))
            continue
        paired = Timing.of(seconds, sampled.times[DENSE][: len(seconds)])
        took, ratio = paired.first.median, paired.ratio.median
        rows.append(Measured(case, dtype_name(dtype), name, took, ratio, *said))
    return rows, failed


def _said(
    kernel: Kernel, inputs: AttentionInputs, pattern: Pattern
) -> tuple[Work | None, float | None]:
    return kernel.work(inputs, pattern), kernel.speed(inputs, pattern)


def _dense(inputs: AttentionInputs) -> Callable[[], Any]:
    operands = inputs.q, inputs.k, inputs.v, inputs.bias
    return partial(dense_attention, *operands, scale=inputs.scale)


def _masked(inputs: AttentionInputs) -> AttentionInputs:
    """The call under an additive mask, one for all images, as a bias of positions is."""
    shape = (1, inputs.q.shape[1], inputs.n_queries, inputs.n_keys)
    return inputs.replace(bias=torch.zeros(shape, device=inputs.device, dtype=inputs.q.dtype))


def _logits(inputs: AttentionInputs) -> int:
    return inputs.q.shape[:2].numel() * inputs.n_queries * inputs.n_keys


def _prepare(
    case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[AttentionInputs, Callable[[], Pattern], Work | None]:
    """Random operands, what plans for them, and the work of planning."""
    lengths = tuple(case.tokens * (8 + i % 8) // 16 for i in range(case.batch))
    batch, rows = (1, sum(lengths)) if case.k is None else (case.batch, case.tokens + 1)
    shape = (3, batch, rows, case.heads, case.dim)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v = qkv.transpose(2, 3).unbind(0)  # laid out as a host's are: views of one projection
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
        finish(planned, inputs, background=background)  # where votes are counted
    work = cost.planning_of(planned, macs_of(counter), inputs).work
    return inputs, lambda: finish(planner(inputs), inputs, background=background), work


def _kernels(inputs: AttentionInputs, pattern: Pattern) -> list[Kernel]:
    """Kernels that take the call, without those whose matrices of logits would be huge."""
    skipped: set[str] = {"reference", "sdpa"} if _logits(inputs) > MOST_LOGITS else set()
    if isinstance(pattern, Lengths):  # here it runs image by image
        skipped -= {"sdpa"}
    return [
        kernel
        for kernel in REGISTRY.all("kernels").values()
        if kernel.name not in skipped and not refusals(kernel, inputs, pattern)
    ]
