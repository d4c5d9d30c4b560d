"""Work of a call, the prices of its parts, and the prices that come with the package for CPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.compiled import is_loaded

# Prices are stored by kernel name and by these names: dense attention, dense attention with the
# host's mask or bias, and planning.
DENSE, MASKED, PLANNING = "dense", "masked", "planning"

# Cost of a softmax entry with a mask relative to one without, in torch's attention, which took 1.1x
# to 1.2x the time on a Xeon with AVX-512. The built-in prices of MASKED use it; `tune` measures
# them.
MASK_WORTH = 2.0

COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    # a speed of 0.37 N / (keys + 480) relative to dense attention, measured with 2 threads, D=64
    "flex": Prices(1e-6, 3.9e-11, 6.8e-10, 1e-11, 2.7e-6),
}
_CPU[MASKED] = masked_prices(_CPU[DENSE])
# where the compiled code of `native` also plans
_CPU_COMPILED = {**_CPU, PLANNING: Prices(5.6e-06, 4.78e-12, 1.29e-08, 9.6e-12, 5.1e-08)}
# torch's bfloat16 products with AMX relative to float32: dense attention took 0.42 to 0.54 of the
# time at 197 to 1,370 tokens, on one processor. Compiled code computes and plans in float32, so its
# prices stay. `tune` with bfloat16 among its dtypes replaces all of these.
_AMX_SHARE = 0.45
_BY_TORCH = (DENSE, MASKED, "reference", "sdpa", "gather")


def cpu_prices(dtype: torch.dtype) -> dict[str, Prices]:
    """The built-in prices of CPUs."""
    table = _CPU_COMPILED if dtype in COMPILED_TYPES and is_loaded() else _CPU
    return _with_amx(table) if dtype == torch.bfloat16 and _has_amx() else table


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
