"""`tune`: measure attention on this machine once, so that `auto` knows what is fast here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Lengths, Pattern
from sparsiattn.attention.sdpa import dense_attention
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.kernels import cost
from sparsiattn.kernels import tuning_cache as tuningfile
from sparsiattn.kernels.base import Kernel, refusals
from sparsiattn.kernels.cost import DENSE, PLANNING, CallShape, Prices, Work
from sparsiattn.kernels.native.kernel import compile_native
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime import timing

# The slowest kernels write whole matrices of logits; above this many they are not measured.
MOST_LOGITS = 8 << 20


@dataclass(frozen=True)
class Case:
    """One attention call to measure: `connectivity` over ``tokens`` patches and a CLS token, or,
    without ``k``, ``batch`` images of different lengths packed into one sequence."""

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
    Case(1024, 0.1, (8, 8)),
    Case(1024, 0.25, (8, 8)),
    Case(1024, 0.1, (8, 8), heads=12),
    Case(1024, 0.1, (8, 8), heads=6, dim=32),
    Case(1024, 0.1, (8, 8), batch=4),
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
    """What one kernel took for one `Case`. ratio: dense time over its time, the median of paired
    runs; expected: by the prices in force after fitting. ``planning`` counts as a kernel."""

    case: Case
    dtype: str
    kernel: str
    seconds: float
    ratio: float
    work: Work | None
    expected: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. device: where. rows: what was timed. prices: fitted to them. path: the
    file it was written to, None if that failed (then it holds in this process only)."""

    device: str
    rows: tuple[Measured, ...]
    prices: dict[str, dict[str, Prices]]
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": None if self.path is None else str(self.path)}


def tune(
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = True,
    on_case: Callable[[int, int], Any] | None = None,
) -> Tuning:
    """Measure dense attention, every kernel that works here, and planning, in paired runs; fit the
    prices by which ``auto``, ``only_if_faster`` and reports judge, and keep them in a file.

    device: the GPU where there is one, else the CPU. dtypes: float32 on a CPU, bfloat16, float16
    and float32 on a GPU. quick: a small grid of shapes, under a minute on two CPU cores; otherwise
    more of them, and longer. on_case: called with cases done and cases in all. Live patches choose
    anew at their next forward pass.

    >>> print(tune())  # doctest: +SKIP
    """
    where = _device(device)
    if where.type == "cpu":
        compile_native()
    kinds = _dtypes(where, dtypes)
    cases = [_sized(case, where) for case in (QUICK if quick else QUICK + MORE)]
    rows: list[Measured] = []
    for done, (dtype, case) in enumerate((d, c) for d in kinds for c in cases):
        rows += measure(case, where, dtype, rounds=5 if quick else 11)
        if on_case is not None:
            on_case(done + 1, len(kinds) * len(cases))
    prices = {_name(d): fit_all([r for r in rows if r.dtype == _name(d)], where, d) for d in kinds}
    path = tuningfile.write(dict(_entries(rows, prices, where, kinds)))
    cost.reload()
    return Tuning(tuningfile.device_name(where), tuple(_judged(rows, prices)), prices, path)


def _device(device: str | torch.device | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type not in ("cpu", "cuda"):
        raise InvalidOption(f"tune() knows 'cpu' and 'cuda' devices, got {device!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOption(f"tune() got device {device!r}, but torch sees no CUDA device here")
    index = torch.cuda.current_device() if found.type == "cuda" and found.index is None else None
    return found if index is None else torch.device("cuda", index)


def _dtypes(device: torch.device, dtypes: Sequence[torch.dtype] | None) -> list[torch.dtype]:
    if dtypes is None:
        half = [torch.bfloat16, torch.float16] if device.type == "cuda" else []
        return [*half, torch.float32]
    found = list(dtypes)
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if not found or any(dtype not in known for dtype in found):
        raise InvalidType(f"dtypes must be some of {known}, got {dtypes!r}")
    return found


def _sized(case: Case, device: torch.device) -> Case:
    """A GPU is not busy with one image."""
    if device.type == "cpu" or case.k is None:
        return case
    return Case(case.tokens, case.k, case.tile, case.heads, case.dim, case.batch * 8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Measured]:
    """Times of one case: dense, planning, and each kernel that takes it."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        inputs, plan, planning = _prepared(case, device, dtype, generator)
        pattern = plan()
        kernels = _kernels(inputs, pattern)
        q, k, v = inputs.q, inputs.k, inputs.v
        calls: dict[str, Callable[[], Any]] = {
            DENSE: lambda: dense_attention(q, k, v, scale=inputs.scale)
        }
        if planning is not None:
            calls[PLANNING] = plan
        for kernel in kernels:
            calls[kernel.name] = partial(kernel, inputs, pattern)
        times = timing.alternate(calls, rounds)
    works = {kernel.name: kernel.work(inputs, pattern) for kernel in kernels}
    works |= {DENSE: CallShape.of(inputs).dense, PLANNING: planning}
    said = {kernel.name: kernel.speed(inputs, pattern) for kernel in kernels}
    return [
        Measured(
            case, _name(dtype), name, median(took), _ratio(times[DENSE], took), works[name],
            said.get(name),
        )
        for name, took in times.items()
    ]  # fmt: skip


def _ratio(dense: list[float], other: list[float]) -> float:
    return median(a / b for a, b in zip(dense, other, strict=True))


Prepared = tuple[AttentionInputs, Callable[[], Pattern], Work | None]


def _prepared(
    case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Prepared:
    """Random operands, what plans for them, and the work of planning."""
    from sparsiattn.strategies.connectivity import Connectivity
    from sparsiattn.strategies.finalize import finish

    if case.k is None:
        return _ragged(case, device, dtype, generator)
    q, k, v = _operands(case.batch, case.tokens + 1, case, device, dtype, generator)
    site = Site.of(q, k, v, prefix_tokens=1)
    strategy = Connectivity(k=case.k, tile=case.tile)
    inputs = AttentionInputs(
        q, k, v, case.dim**-0.5, None, site, tile=case.tile, block=strategy.block_for(site.keys)
    )
    planner = strategy.planner(site).to(device, dtype)
    work = planning_work(planner, inputs)
    return inputs, lambda: finish(planner(inputs), inputs, background=2), work


def planning_work(planner: Callable[[AttentionInputs], Pattern], inputs: AttentionInputs) -> Work:
    """What a planner does for these inputs, its multiplications counted as it runs."""
    from sparsiattn.attention.pattern import Ranked
    from sparsiattn.patching.flop_counter import mac_counter

    with mac_counter() as counter:
        wish = planner(inputs)
    scores = wish.scores.numel() if isinstance(wish, Ranked) else 0
    return cost.planning(int(counter.get_total_flops()) // 2, scores, CallShape.of(inputs)).work


def _operands(
    batch: int, rows: int, case: Case, device: torch.device, dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Laid out as a host's are: views of one projection."""
    shape = (3, batch, rows, case.heads, case.dim)
    q, k, v = torch.randn(shape, generator=generator).to(device, dtype).transpose(2, 3).unbind(0)
    return q, k, v


def _ragged(
    case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Prepared:
    lengths = tuple(case.tokens * (8 + i % 8) // 16 for i in range(case.batch))
    total = sum(lengths)
    q, k, v = _operands(1, total, case, device, dtype, generator)
    inputs = AttentionInputs(q, k, v, case.dim**-0.5, None, Site.of(q, k, v))
    pattern = Lengths(total, total, lengths)
    return inputs, lambda: pattern, None


def _kernels(inputs: AttentionInputs, pattern: Pattern) -> list[Kernel]:
    small = inputs.q.shape[0] * inputs.q.shape[1] * inputs.n_queries * inputs.n_keys <= MOST_LOGITS
    found: list[Kernel] = [
        kernel
        for kernel in REGISTRY.all("kernels").values()
        if not refusals(kernel, inputs, pattern)
    ]
    whole = () if small or isinstance(pattern, Lengths) else ("sdpa",)
    return [k for k in found if k.name not in whole and (small or k.name != "reference")]


def fit_all(
    rows: Iterable[Measured], device: torch.device, dtype: torch.dtype
) -> dict[str, Prices]:
    """Prices of everything that says what `Work` it does."""
    usual = cost.shipped(device, dtype)
    by_kernel: dict[str, list[tuple[Work, float]]] = {}
    for row in rows:
        if row.work is not None:
            by_kernel.setdefault(row.kernel, []).append((row.work, row.seconds))
    return {name: fit(known, usual.get(name, usual["gather"])) for name, known in by_kernel.items()}


def fit(known: Sequence[tuple[Work, float]], start: Prices, ridge: float = 0.01) -> Prices:
    """Prices under which works take about their seconds: least squares of log time over log prices
    (Levenberg and Marquardt's method), so they are positive and short calls count as much as long
    ones. ``ridge`` holds a price that the works cannot tell where it started."""
    x = torch.tensor([work.features() for work, _ in known], dtype=torch.float64)
    y = torch.tensor([took for _, took in known], dtype=torch.float64).log()
    begin = torch.tensor(astuple(start), dtype=torch.float64).log()
    one = torch.eye(len(begin), dtype=torch.float64)

    def error(at: Tensor) -> float:
        return float((((x @ at.exp()).log() - y) ** 2).sum() + ridge * ((at - begin) ** 2).sum())

    at, damping = begin.clone(), 1.0
    for _ in range(100):
        paid = x * at.exp()
        slope = paid / paid.sum(1, keepdim=True)
        off = paid.sum(1).log() - y
        normal = slope.mT @ slope + ridge * one
        pull = slope.mT @ off + ridge * (at - begin)
        step = torch.linalg.solve(normal + damping * one, pull)
        better = error(at - step) < error(at)
        at, damping = (at - step, damping / 3) if better else (at, damping * 3)
    return Prices(*at.exp().tolist())


def _judged(rows: list[Measured], prices: dict[str, dict[str, Prices]]) -> Iterator[Measured]:
    """The rows with what the fitted prices say; kernels with a `speed` of their own keep theirs."""
    for row in rows:
        mine = prices[row.dtype]
        if row.work is None:
            yield row
            continue
        base = next(r for r in rows if (r.case, r.dtype, r.kernel) == (row.case, row.dtype, DENSE))
        assert base.work is not None
        expected = mine[DENSE].of(base.work) / mine[row.kernel].of(row.work)
        yield Measured(
            row.case, row.dtype, row.kernel, row.seconds, row.ratio, row.work, expected
        )  # fmt: skip


def _entries(
    rows: list[Measured], prices: dict[str, dict[str, Prices]], device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    for dtype in dtypes:
        mine = _judged([row for row in rows if row.dtype == _name(dtype)], prices)
        yield (
            tuningfile.key(device, dtype),
            {
                "date": date.today().isoformat(),
                "prices": {name: asdict(price) for name, price in prices[_name(dtype)].items()},
                "rows": [row.to_dict() for row in mine],
            },
        )
