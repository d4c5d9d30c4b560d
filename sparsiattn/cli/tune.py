"""``sparsiattn tune``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.options import AsJson, DeviceOrGPU, dtype_of

if TYPE_CHECKING:
    from rich.table import Table

    from sparsiattn import Tuning


def tune_here(
    device: DeviceOrGPU = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A small grid of shapes, or a larger one.")] = True,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds to take at most, about; 45 with --quick, else no limit."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Every time, in a table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure attention on this machine, so that kernel="auto" knows what is fast here.

    Writes tuning.json in $SPARSIATTN_CACHE or the user's cache folder. Example: sparsiattn tune
    """
    from rich.console import Console

    from sparsiattn import tune

    dtypes = None if not dtype else [dtype_of(name) for name in dtype]
    start = time.perf_counter()
    with Console(stderr=True).status("measuring, under a minute" if quick else "measuring") as bar:

        def show(done: int, total: int) -> None:
            left = (time.perf_counter() - start) / done * (total - done)
            bar.update(f"measured {done} of {total} shapes, about {left:.0f} s left")

        tuning = tune(device, dtypes, quick, on_case=show, budget=budget)
    table = _table(tuning) if verbose else None
    print_result(as_json, tuning.to_dict(), table, tuning, indent=1)


def _table(tuning: Tuning) -> Table:
    from rich.table import Table

    from sparsiattn.patching.text import shape_text, speed_text

    title = f"speed relative to dense attention, {tuning.device}"
    case_columns = ("tokens", "k", "tile", "heads x dim", "batch")
    run_columns = ("dtype", "kernel", "ms", "measured", "expected")
    table = Table(*case_columns, *run_columns, title=title, title_justify="left")
    for row in tuning.rows:
        case = row.case
        table.add_row(
            str(case.tokens),
            "ragged" if case.k is None else str(case.k),
            shape_text(case.tile),
            f"{case.heads} x {case.dim}",
            str(case.batch),
            row.dtype,
            row.kernel,
            f"{1e3 * row.seconds:.2f}",
            speed_text(row.ratio),
            speed_text(row.expected),
        )
    return table
