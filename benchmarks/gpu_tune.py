"""`tune` on a GPU in bfloat16: every measurement as a row, and the prices that were fitted.

    python benchmarks/gpu_tune.py [--budget SECONDS] [--out DIR]

The tuning file is ``DIR/cache/tuning.json``: copy it to ``$SPARSIATTN_CACHE`` to use it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_device import Rows, arguments, session

from sparsiattn.analysis.benchmark import tuning
from sparsiattn.kernels import cost


@contextmanager
def _without_values() -> Iterator[None]:
    """Times of a run without a GPU say nothing, so that nothing is fitted to them."""

    def shipped(rows: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        known = cost.shipped(device, dtype)
        return {row.kernel: known[row.kernel] for row in rows}

    with mock.patch.object(tuning, "fit_all", shipped):
        yield


def tune(budget: float, out: Path) -> tuning.Tuning:
    os.environ["SPARSIATTN_CACHE"] = str(out / "cache")
    cost.reload()
    return tuning.tune("cuda", [torch.bfloat16], budget=budget)


def row_of(measured: Any, fake: bool) -> dict[str, Any]:
    """One measurement; times of a run without a GPU are left out."""
    times = {"ms": 1e3 * measured.seconds, "ratio": measured.ratio, "expected": measured.expected}
    return {"work": measured.work, **({} if fake else times)}


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=110.0)
    options = parser.parse_args(given)
    rows = Rows(options.out / "tune.jsonl", fake=options.fake, resume=options.resume)
    found: list[tuning.Tuning] = []

    def make() -> dict[str, Any]:
        found.append(tune(options.budget, options.out))
        return {"verdict": found[0].verdict(), "failures": len(found[0].failures)}

    with session(options.fake):
        if options.fake:
            with _without_values():
                rows.add("tune", make)
        else:
            rows.add("tune", make)
    for one in found:
        for m in one.rows:
            shape = f"N={m.case.tokens} B={m.case.batch} H={m.case.heads} D={m.case.dim}"
            name = f"tune | {shape} k={m.case.k} tile={m.case.tile} | {m.kernel}"
            rows.add(name, partial(row_of, m, options.fake))
        if not options.fake:
            text = json.dumps(one.to_dict(), indent=1, default=str)
            (options.out / "tune.json").write_text(text + "\n")
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
