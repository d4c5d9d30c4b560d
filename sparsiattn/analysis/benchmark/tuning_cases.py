"""The attention calls that `tune` measures, and how long each way to compute one takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from sparsiattn.attention import AttentionInputs, Lengths, Pattern, Site, Tile, dense_attention
from sparsiattn.kernels import CallShape, Kernel, Work, cost, refusals
from sparsiattn.kernels.cost import DENSE, PLANNING
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.registry import REGISTRY
from sparsiattn.runtime import Timing, timing
from sparsiattn.strategies import Connectivity, finish

# The slowest kernels write whole matrices of logits; above this many they are not measured.
MOST_LOGITS = 8 << 20
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


QUICK = (
    Case(196, 0.25),
    Case(196, 0.25, (7, 7)),
    Case(196, 0.25, (7, 7), batch=8),
    Case(576, 0.1),
    Case(576, 0.25, (8, 8)),
    Case(1024, 0.1, (8, 4)),
    Case(1024, 0.25, (8, 4)),
    Case(1024, 0.1, (8, 4), heads=12),
    Case(1024, 0.1, (8, 4), heads=6, dim=32),
    Case(1024, 0.1, (8, 4), batch=4),
    Case(2304, 0.1, (8, 8)),
    Case(4096, 0.1, (8, 8)),
    Case(4096, 0.1, (16, 8)),
    Case(4096, 0.25, (8, 8)),
    Case(196, None, batch=8),
)
MORE = (
    Case(196, 0.1, batch=8),
    Case(784, 0.1, (7, 7), heads=3),
    Case(784, 0.5, (7, 7), heads=3),
    Case(1024, 0.5, (16, 16)),
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
        kernel: Name of the kernel, ``"dense"`` or ``"planning"``.
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


def measure(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Measured]:
    """Times of one case: dense, planning, and each kernel that takes it."""
    with torch.inference_mode():
        inputs, plan, planning = _prepare(case, device, dtype)
        pattern = plan()
        kernels = {kernel.name: kernel for kernel in _kernels(inputs, pattern)}
        calls: dict[str, Callable[[], Any]] = {
            DENSE: partial(dense_attention, inputs.q, inputs.k, inputs.v, scale=inputs.scale)
        }
        if planning is not None:
            calls[PLANNING] = plan
        calls |= {name: partial(kernel, inputs, pattern) for name, kernel in kernels.items()}
        times = timing.alternate(calls, rounds)
    works = {DENSE: CallShape.of(inputs).dense, PLANNING: planning}
    works |= {name: kernel.work(inputs, pattern) for name, kernel in kernels.items()}
    speeds = {name: kernel.speed(inputs, pattern) for name, kernel in kernels.items()}
    rows = []
    for name, seconds in times.items():
        paired = Timing.of(seconds, times[DENSE])
        took, ratio = paired.first.median, paired.ratio.median
        rows.append(
            Measured(case, dtype_name(dtype), name, took, ratio, works[name], speeds.get(name))
        )
    return rows


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
    with mac_counter() as counter:
        work = cost.planning_of(planner(inputs), macs_of(counter), inputs).work
    background = strategy.background_for(inputs.key_grid)
    return inputs, lambda: finish(planner(inputs), inputs, background=background), work


def _kernels(inputs: AttentionInputs, pattern: Pattern) -> list[Kernel]:
    """Kernels that take the call, without those whose matrices of logits would be huge."""
    logits = inputs.q.shape[:2].numel() * inputs.n_queries * inputs.n_keys
    skipped: set[str] = {"reference", "sdpa"} if logits > MOST_LOGITS else set()
    if isinstance(pattern, Lengths):  # here it runs image by image
        skipped -= {"sdpa"}
    return [
        kernel
        for kernel in REGISTRY.all("kernels").values()
        if kernel.name not in skipped and not refusals(kernel, inputs, pattern)
    ]
