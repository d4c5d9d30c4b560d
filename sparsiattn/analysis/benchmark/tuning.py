"""`tune`: measure attention on this machine once, so that `auto` knows what is fast here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from datetime import date
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import AttentionInputs, Lengths, Pattern, Site, Tile, dense_attention
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.kernels import (
    CallShape,
    Kernel,
    Prices,
    Work,
    compile_native,
    cost,
    refusals,
    tuning_cache,
)
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


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        device: The machine.
        rows: What was timed.
        prices: Fitted to the rows, by data type and kernel.
        path: The file that holds them; None if it could not be written, and then they hold in this
            process only.
    """

    device: str
    rows: tuple[Measured, ...]
    prices: dict[str, dict[str, Prices]]
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "path": None if self.path is None else str(self.path)}


def tune(
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = True,
    on_case: Callable[[int, int], Any] | None = None,
) -> Tuning:
    """Measure dense attention, every kernel that works here, and planning, in paired runs.

    Prices are fitted to the times and kept in a file; ``auto``, ``only_if_faster`` and reports
    judge by them. Live patches choose anew at their next forward pass.

    Args:
        device: The GPU where there is one, else the CPU.
        dtypes: By default float32 on a CPU, and bfloat16, float16 and float32 on a GPU.
        quick: A small grid of shapes, under a minute on two CPU cores; otherwise more of them.
        on_case: Called with the number of cases done and of all cases.

    Returns:
        Times, prices and the file.

    Raises:
        InvalidOption: The device is not there, or is of another kind.
        InvalidType: ``dtypes`` holds something that is no floating-point type.

    >>> print(tune())  # doctest: +SKIP
    """
    device = _device(device)
    if device.type == "cpu":
        compile_native()
    dtypes = _dtypes(device, dtypes)
    cases = [_sized(case, device) for case in (QUICK if quick else QUICK + MORE)]
    rows: list[Measured] = []
    for done, (dtype, case) in enumerate(product(dtypes, cases), 1):
        rows += measure(case, device, dtype, rounds=5 if quick else 11)
        if on_case is not None:
            on_case(done, len(dtypes) * len(cases))
    by_dtype = {dtype: [row for row in rows if row.dtype == _name(dtype)] for dtype in dtypes}
    prices = {_name(d): fit_all(rows, device, d) for d, rows in by_dtype.items()}
    judged = {d: tuple(_judged(rows, prices[_name(d)])) for d, rows in by_dtype.items()}
    entries = {
        tuning_cache.key(device, dtype): {
            "date": date.today().isoformat(),
            "prices": {name: asdict(price) for name, price in prices[_name(dtype)].items()},
            "rows": [row.to_dict() for row in rows],
        }
        for dtype, rows in judged.items()
    }
    path = tuning_cache.write(entries)
    cost.reload()
    all_rows = tuple(chain.from_iterable(judged.values()))
    return Tuning(tuning_cache.device_name(device), all_rows, prices, path)


def _device(name: str | torch.device | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise InvalidOption(f"tune() knows 'cpu' and 'cuda' devices, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOption(f"tune() got device {name!r}, but torch sees no CUDA device here")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dtypes(device: torch.device, dtypes: Sequence[torch.dtype] | None) -> list[torch.dtype]:
    if dtypes is None:
        half = [torch.bfloat16, torch.float16] if device.type == "cuda" else []
        return [*half, torch.float32]
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if not dtypes or any(dtype not in known for dtype in dtypes):
        raise InvalidType(f"dtypes must be some of {known}, got {dtypes!r}")
    return list(dtypes)


def _sized(case: Case, device: torch.device) -> Case:
    grows = device.type != "cpu" and case.k is not None
    return replace(case, batch=case.batch * GPU_BATCH) if grows else case


def _name(dtype: torch.dtype) -> str:
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
        rows.append(Measured(case, _name(dtype), name, took, ratio, works[name], speeds.get(name)))
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


def fit_all(
    rows: Iterable[Measured], device: torch.device, dtype: torch.dtype
) -> dict[str, Prices]:
    """Prices of everything that says what `Work` it does."""
    shipped = cost.shipped(device, dtype)
    works: dict[str, list[tuple[Work, float]]] = {}
    for row in rows:
        if row.work is not None:
            works.setdefault(row.kernel, []).append((row.work, row.seconds))
    return {name: fit(known, shipped.get(name, shipped["gather"])) for name, known in works.items()}


def fit(known: Sequence[tuple[Work, float]], start: Prices, ridge: float = 0.01) -> Prices:
    """Fit prices under which works take about their seconds.

    Least squares of log time over log prices, by the method of Levenberg and Marquardt: prices are
    positive, and short calls count as much as long ones.

    Args:
        known: Works and their seconds.
        start: Prices to begin with.
        ridge: Pull to where a price started; it holds those that the works cannot tell.
    """
    features = torch.tensor([work.features() for work, _ in known], dtype=torch.float64)
    log_seconds = torch.tensor([seconds for _, seconds in known], dtype=torch.float64).log()
    begin = torch.tensor(astuple(start), dtype=torch.float64).log()
    identity = torch.eye(len(begin), dtype=torch.float64)

    def loss(log_prices: Tensor) -> float:
        error = (features @ log_prices.exp()).log() - log_seconds
        return float((error**2).sum() + ridge * ((log_prices - begin) ** 2).sum())

    log_prices, damping = begin.clone(), 1.0
    for _ in range(100):
        paid = features * log_prices.exp()
        slope = paid / paid.sum(1, keepdim=True)
        error = paid.sum(1).log() - log_seconds
        normal = slope.mT @ slope + ridge * identity
        gradient = slope.mT @ error + ridge * (log_prices - begin)
        step = torch.linalg.solve(normal + damping * identity, gradient)
        if loss(log_prices - step) < loss(log_prices):
            log_prices, damping = log_prices - step, damping / 3
        else:
            damping *= 3
    return Prices(*log_prices.exp().tolist())


def _judged(rows: list[Measured], prices: dict[str, Prices]) -> Iterator[Measured]:
    """The rows with what the fitted prices say; kernels with a `speed` of their own keep theirs."""
    dense_seconds = {
        row.case: prices[DENSE].of(row.work) for row in rows if row.kernel == DENSE and row.work
    }
    for row in rows:
        if row.work is None:
            yield row
        else:
            expected = dense_seconds[row.case] / prices[row.kernel].of(row.work)
            yield replace(row, expected=expected)
