"""`tune`: measure attention on this machine, so that ``kernel="auto"`` knows what is fast here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from sparsiattn.kernels import Prices, Work, compile_native, cost, gpu_prices, tuning_cache
from sparsiattn.kernels.prices import DENSE, MASKED, PLANNING

# Default time limit of `tune` with the small grid of shapes, in seconds.
BUDGET = 45.0


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`. Printing it shows its `verdict`.

    Attributes:
        device: Name of the device.
        rows: The measurements.
        prices: Prices fitted to the measurements, by data type and kernel.
        path: The file with the prices; None if it could not be written, so that the prices apply
            to this process only.
        failures: Calls that raised. ``auto`` does not use these kernels on this machine.
        unmeasured: Number of shapes that were skipped because the time limit was reached.
        estimates: On a GPU, which kernels keep prices from data sheets, in words; one line for each
            data type.

    >>> tuning = tune(budget=10)  # doctest: +SKIP
    >>> print(tuning)  # doctest: +SKIP
    """

    device: str
    rows: tuple[Measured, ...]
    prices: dict[str, dict[str, Prices]]
    path: Path | None
    failures: tuple[Failure, ...] = ()
    unmeasured: int = 0
    estimates: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.verdict())

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def verdict(self) -> list[str]:
        """Lines on the fastest kernels, the sizes at which sparse attention pays, and the file."""
        written = f"kernel='auto' uses these times from now on: {self.path}"
        unwritten = "no file could be written; kernel='auto' uses these times in this process only"
        lines = [*verdict_of(self.rows), unwritten if self.path is None else written]
        lines += [failure_line(failure) for failure in self.failures]
        lines += self.estimates
        if self.unmeasured:
            lines.append(f"not measured, as the time limit was reached: {self.unmeasured} shapes")
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
    """Measure dense attention, planning and every kernel that works here, in paired runs.

    Prices are fitted to the times and stored in a file; ``auto``, ``only_if_faster`` and reports
    use them. Active patches select their kernels again at the next forward pass. A kernel that
    raises is listed in the result and in the file, and ``auto`` does not use it on this machine
    until `tune` runs again (from that size on, if memory was too small).

    Args:
        device: The device to measure; None for the GPU if there is one, else the CPU.
        dtypes: Data types to measure; None for float32 on a CPU, and bfloat16, float16 and float32
            on a GPU.
        quick: Whether to measure a small grid of shapes, without kernels that compile for half a
            minute for each (`flex`); otherwise a larger one, with all kernels.
        on_case: Called with the number of cases done and the total.
        budget: Time limit in seconds, including compilation; None for 45 s if ``quick``, else no
            limit. Slow kernels run less often, and shapes are skipped when no time is left, but
            every started shape is finished, and at least one is measured.

    Returns:
        Times, prices and the file.

    Raises:
        InvalidOption: The device is not available or not supported, or ``budget`` is not a positive
            number.
        InvalidType: ``dtypes`` contains a type that is not supported.
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
        remaining = budget - (time.perf_counter() - start)
        if remaining <= 0 and rows:
            done -= 1
            break
        limit = remaining / (1 + len(todo) - done)
        rounds = 5 if quick else 11
        measured, failed = measure(case, device, dtype, rounds, limit, compiles=not quick)
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
    """Fit the prices, write the file, and make active patches select their kernels again."""
    if not rows:
        errors = "; ".join(sorted({failure.error for failure in failures}))
        raise SparsiattnError(f"tune() could not measure any shape on {device}: {errors}")
    prices: dict[str, dict[str, Prices]] = {}
    judged: list[Measured] = []
    entries = {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        of_dtype = [row for row in rows if row.dtype == name]
        if not of_dtype:
            continue
        prices[name] = fit_all(of_dtype, device, dtype)
        of_dtype = list(_judged(of_dtype, prices[name]))
        judged += of_dtype
        entries[tuning_cache.key(device, dtype)] = {
            "date": date.today().isoformat(),
            "prices": {kernel: asdict(price) for kernel, price in prices[name].items()},
            "rows": [row.to_dict() for row in of_dtype],
            "failed": _failed([failure for failure in failures if failure.dtype == name]),
        }
    path = tuning_cache.write(entries)
    cost.reload()
    place, estimates = tuning_cache.device_name(device), tuple(_estimates(device, prices))
    return Tuning(place, tuple(judged), prices, path, tuple(failures), unmeasured, estimates)


def _estimates(device: torch.device, prices: Mapping[str, Mapping[str, Prices]]) -> Iterator[str]:
    """On a GPU, a line for each data type about the kernels that were not measured."""
    if device.type != "cuda":
        return
    origin, known = gpu_prices.known(device).origin, cost.shipped(device, torch.float32)
    for dtype, measured in prices.items():
        missing = [name for name in known if name not in (*measured, MASKED)]
        if missing:
            yield f"{dtype}: not measured, estimated from {origin}: {', '.join(missing)}"


def _failed(failures: Iterable[Failure]) -> dict[str, dict[str, Any]]:
    """By kernel, the failure with the fewest pairs, in the form that `cost.failures` reads."""
    entries: dict[str, dict[str, Any]] = {}
    for failure in sorted(failures, key=lambda failure: -failure.pairs):
        if failure.kernel not in (DENSE, MASKED, PLANNING):
            entries[failure.kernel] = {"error": failure.error, "pairs": failure.pairs}
    return entries


def _device(name: str | torch.device | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise InvalidOption(f"device must be 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOption(
            f"device {name!r} needs CUDA, but torch finds no CUDA device here: use 'cpu'"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dtypes(device: torch.device, dtypes: Sequence[torch.dtype] | None) -> list[torch.dtype]:
    if dtypes is None:
        half = [torch.bfloat16, torch.float16] if device.type == "cuda" else []
        return [*half, torch.float32]
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if not dtypes or any(dtype not in known for dtype in dtypes):
        raise InvalidType(f"dtypes must be a list of some of {known}, got {dtypes!r}")
    return list(dtypes)


def fit_all(
    rows: Iterable[Measured], device: torch.device, dtype: torch.dtype
) -> dict[str, Prices]:
    """Fit the prices of all rows with a known `Work`, by kernel."""
    shipped = cost.shipped(device, dtype)
    works: dict[str, list[tuple[Work, float]]] = {}
    for row in rows:
        if row.work is not None:
            works.setdefault(row.kernel, []).append((row.work, row.seconds))
    return {name: fit(known, shipped.get(name, shipped["gather"])) for name, known in works.items()}


def _judged(rows: list[Measured], prices: dict[str, Prices]) -> Iterator[Measured]:
    """Yield the rows with the ratios that fitted prices predict; without work, unchanged rows."""
    dense_seconds = {
        row.case: prices[DENSE].of(row.work) for row in rows if row.kernel == DENSE and row.work
    }
    for row in rows:
        if row.work is None:
            yield row
        else:
            expected = dense_seconds[row.case] / prices[row.kernel].of(row.work)
            yield replace(row, expected=expected)
