"""`tune`: measure attention on this machine once, so that `auto` knows what is fast here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sparsiattn.analysis.benchmark.price_fit import fit
from sparsiattn.analysis.benchmark.tuning_cases import (
    MORE,
    QUICK,
    Failure,
    Measured,
    dtype_name,
    measure,
    sized,
)
from sparsiattn.analysis.benchmark.tuning_verdict import failure_line, verdict_of
from sparsiattn.errors import InvalidOption, InvalidType, SparsiattnError
from sparsiattn.kernels import Prices, Work, compile_native, cost, tuning_cache
from sparsiattn.kernels.cost import DENSE, MASKED, PLANNING

# Seconds that `tune` takes at most, about, with the small grid of shapes.
BUDGET = 45.0


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. As text it is its `verdict`.

    Attributes:
        device: The machine.
        rows: What was timed.
        prices: Fitted to the rows, by data type and kernel.
        path: The file that holds them; None if it could not be written, and then they hold in this
            process only.
        failures: What raised. ``auto`` does not take such a kernel on this machine.
        unmeasured: Shapes left out because the budget was spent.
    """

    device: str
    rows: tuple[Measured, ...]
    prices: dict[str, dict[str, Prices]]
    path: Path | None
    failures: tuple[Failure, ...] = ()
    unmeasured: int = 0

    def __str__(self) -> str:
        return "\n".join(self.verdict())

    def verdict(self) -> list[str]:
        """What is fastest where, from how many tokens sparse attention pays, where the file is."""
        written = f"kernel='auto' judges by it from now on: {self.path}"
        unwritten = "no file could be written; this process judges by it until it ends"
        lines = [*verdict_of(self.rows), unwritten if self.path is None else written]
        lines += [failure_line(failure) for failure in self.failures]
        if self.unmeasured:
            lines.append(f"left out, as the budget was spent: {self.unmeasured} shapes")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        path = None if self.path is None else str(self.path)
        return {**asdict(self), "path": path, "verdict": self.verdict()}


def tune(
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = True,
    on_case: Callable[[int, int], Any] | None = None,
    *,
    budget: float | None = None,
) -> Tuning:
    """Measure dense attention, every kernel that works here, and planning, in paired runs.

    Prices are fitted to the times and kept in a file; ``auto``, ``only_if_faster`` and reports
    judge by them. Live patches choose anew at their next forward pass. A kernel that raises is
    named in the result and the file, and ``auto`` takes it no more on this machine (from that size
    on, where memory was short) until `tune` runs again.

    Args:
        device: The GPU where there is one, else the CPU.
        dtypes: By default float32 on a CPU, and bfloat16, float16 and float32 on a GPU.
        quick: A small grid of shapes, under a minute on two CPU cores; otherwise more of them.
        on_case: Called with the number of cases done and of all cases.
        budget: Seconds to take at most, compiling included: slow kernels run less often, and
            shapes for which no time is left are left out, but every shape that is begun is
            finished, and one is measured in any case. 45 if ``quick``, else as long as it takes.

    Returns:
        Times, prices and the file.

    Raises:
        InvalidOption: The device is not there, or is of another kind, or ``budget`` is no positive
            number.
        InvalidType: ``dtypes`` holds something that is no floating-point type.
        SparsiattnError: Dense attention itself raised at every shape.

    >>> print(tune())  # doctest: +SKIP
    """
    start = time.perf_counter()
    device = _device(device)
    dtypes = _dtypes(device, dtypes)
    budget = _budget(budget, quick)
    if device.type == "cpu":
        compile_native()
    cases = [sized(case, device) for case in (QUICK if quick else QUICK + MORE)]
    todo = list(product(cases, dtypes))
    rows: list[Measured] = []
    failures: list[Failure] = []
    done = 0
    for done, (case, dtype) in enumerate(todo, 1):
        left = budget - (time.perf_counter() - start)
        if left <= 0 and rows:
            done -= 1
            break
        limit = left / (1 + len(todo) - done)
        measured, failed = measure(case, device, dtype, 5 if quick else 11, limit)
        rows, failures = [*rows, *measured], [*failures, *failed]
        if on_case is not None:
            on_case(done, len(todo))
    return _keep(device, dtypes, rows, failures, len(todo) - done)


def _budget(budget: float | None, quick: bool) -> float:
    if budget is None:
        return BUDGET if quick else math.inf
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise InvalidOption(f"budget must be a positive number of seconds, got {budget!r}")
    return float(budget)


def _keep(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    rows: Sequence[Measured],
    failures: Sequence[Failure],
    unmeasured: int,
) -> Tuning:
    """Fit, write the file, and let every live patch ask anew."""
    if not rows:
        said = "; ".join(sorted({failure.error for failure in failures}))
        raise SparsiattnError(f"tune() could measure no shape on {device}: {said}")
    prices: dict[str, dict[str, Prices]] = {}
    judged: list[Measured] = []
    entries = {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        own = [row for row in rows if row.dtype == name]
        if not own:
            continue
        prices[name] = fit_all(own, device, dtype)
        own = list(_judged(own, prices[name]))
        judged += own
        entries[tuning_cache.key(device, dtype)] = {
            "date": date.today().isoformat(),
            "prices": {kernel: asdict(price) for kernel, price in prices[name].items()},
            "rows": [row.to_dict() for row in own],
            "failed": _failed([failure for failure in failures if failure.dtype == name]),
        }
    path = tuning_cache.write(entries)
    cost.reload()
    place = tuning_cache.device_name(device)
    return Tuning(place, tuple(judged), prices, path, tuple(failures), unmeasured)


def _failed(failures: Iterable[Failure]) -> dict[str, dict[str, Any]]:
    """What `cost.failures` reads: of each kernel the failure that counts from the fewest pairs."""
    found: dict[str, dict[str, Any]] = {}
    for failure in sorted(failures, key=lambda failure: -failure.pairs):
        if failure.kernel not in (DENSE, MASKED, PLANNING):
            found[failure.kernel] = {"error": failure.error, "pairs": failure.pairs}
    return found


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
