"""``sparsiattn tune``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from sparsiattn.cli.console import print_result
from sparsiattn.cli.options import AsJson, DeviceOrGPU, device_of, dtype_of, in_output, in_run

if TYPE_CHECKING:
    from rich.table import Table

    from sparsiattn import Tuning


def tune_here(
    device: DeviceOrGPU = None,
    dtype: Annotated[
        list[str] | None,
        in_run(
            metavar="DTYPE",
            show_default="float32; on a GPU bfloat16 and float16, too",
            help="Precision to measure: float32, bfloat16 or float16. Repeatable.",
        ),
    ] = None,
    quick: Annotated[bool, in_run(help="Measure few shapes, or many.")] = True,
    budget: Annotated[
        float | None,
        in_run(
            metavar="SECONDS",
            show_default="45 with --quick, else no limit",
            help="Time limit, approximately.",
        ),
    ] = None,
    verbose: Annotated[
        bool, in_output("--verbose", help="Print every time that was measured in a table.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure kernels on this machine, so that kernel="auto" picks the fastest ones.

    Writes tuning.json to $SPARSIATTN_CACHE, or to the user's cache folder.

    Example: sparsiattn tune
    """
    dtypes = None if not dtype else [dtype_of(name) for name in dtype]
    place = device_of(device)
    from rich.console import Console

    from sparsiattn import tune

    start = time.perf_counter()
    with Console(stderr=True).status("measuring, under a minute" if quick else "measuring") as bar:

        def show(done: int, total: int) -> None:
            left = (time.perf_counter() - start) / done * (total - done)
            bar.update(f"measured {done} of {total} shapes, about {left:.0f} s left")

        tuning = tune(place, dtypes, quick, on_case=show, budget=budget)
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
