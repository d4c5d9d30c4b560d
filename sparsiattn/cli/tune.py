"""``sparsiattn tune``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sparsiattn.cli.console import readable_errors
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
    as_json: AsJson = False,
) -> None:
    """Measure attention on this machine, so that kernel="auto" knows what is fast here.

    Writes tuning.json in $SPARSIATTN_CACHE or the user's cache folder. Example: sparsiattn tune
    """
    from rich.console import Console

    from sparsiattn import tune

    console = Console(stderr=as_json)
    dtypes = None if not dtype else [dtype_of(name) for name in dtype]
    with console.status("measuring") as status, readable_errors():

        def show(done: int, total: int) -> None:
            status.update(f"measured {done} of {total} shapes")

        tuning = tune(device, dtypes, quick, on_case=show)
    if as_json:
        print(json.dumps(tuning.to_dict(), indent=1))
        return
    console.print(_table(tuning))
    path = tuning.path
    console.print(f"wrote {path}" if path else "nothing written: see the warning above")


def _table(tuning: Tuning) -> Table:
    from rich.table import Table

    title = f"speed relative to dense attention, {tuning.device}"
    table = Table("tokens", "k", "tile", "heads x dim", "batch", title=title, title_justify="left")
    for column in ("dtype", "kernel", "ms", "measured", "expected"):
        table.add_column(column)
    for row in tuning.rows:
        case = row.case
        table.add_row(
            str(case.tokens),
            "ragged" if case.k is None else str(case.k),
            str(case.tile) if isinstance(case.tile, int) else "x".join(map(str, case.tile)),
            f"{case.heads} x {case.dim}",
            str(case.batch),
            row.dtype,
            row.kernel,
            f"{1e3 * row.seconds:.2f}",
            f"{row.ratio:.2f}x",
            "-" if row.expected is None else f"{row.expected:.2f}x",
        )
    return table
