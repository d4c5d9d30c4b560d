"""`tune`: measure attention on this machine once, so that `auto` knows what is fast here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from sparsiattn.analysis.benchmark.price_fit import fit
from sparsiattn.analysis.benchmark.tuning_cases import (
    MORE,
    QUICK,
    Measured,
    dtype_name,
    measure,
    sized,
)
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.kernels import Prices, Work, compile_native, cost, tuning_cache
from sparsiattn.kernels.cost import DENSE


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
    cases = [sized(case, device) for case in (QUICK if quick else QUICK + MORE)]
    rows: list[Measured] = []
    for done, (dtype, case) in enumerate(product(dtypes, cases), 1):
        rows += measure(case, device, dtype, rounds=5 if quick else 11)
        if on_case is not None:
            on_case(done, len(dtypes) * len(cases))
    by_dtype = {dtype: [row for row in rows if row.dtype == dtype_name(dtype)] for dtype in dtypes}
    prices = {dtype_name(d): fit_all(rows, device, d) for d, rows in by_dtype.items()}
    judged = {d: tuple(_judged(rows, prices[dtype_name(d)])) for d, rows in by_dtype.items()}
    entries = {
        tuning_cache.key(device, dtype): {
            "date": date.today().isoformat(),
            "prices": {name: asdict(price) for name, price in prices[dtype_name(dtype)].items()},
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
