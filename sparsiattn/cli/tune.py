"""``sparsiattn tune``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import readable
from sparsiattn.cli.options import AsJson, dtype_of

if TYPE_CHECKING:
    from rich.table import Table


def tune_here(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")
    ] = None,
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

    from sparsiattn.analysis.benchmark.tuning import tune

    console = Console(stderr=as_json)
    dtypes = None if not dtype else [dtype_of(name) for name in dtype]
    with console.status("measuring") as status, readable():

        def show(done: int, total: int) -> None:
            status.update(f"measured {done} of {total} shapes")

        found = tune(device, dtypes, quick, on_case=show)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    console.print(_tuned(found))
    console.print(f"wrote {found.path}" if found.path else "nothing written: see the warning above")


def _tuned(found: Any) -> Table:
    from rich.table import Table

    table = Table(
        "tokens", "k", "tile", "heads x dim", "batch", "dtype", "kernel", "ms", "measured",
        "expected", title=f"speed relative to dense attention, {found.device}",
        title_justify="left",
    )  # fmt: skip
    for row in found.rows:
        case = row.case
        tile = case.tile if isinstance(case.tile, int) else "x".join(map(str, case.tile))
        table.add_row(
            str(case.tokens), "ragged" if case.k is None else str(case.k), str(tile),
            f"{case.heads} x {case.dim}", str(case.batch), row.dtype, row.kernel,
            f"{1e3 * row.seconds:.2f}", f"{row.ratio:.2f}x",
            "-" if row.expected is None else f"{row.expected:.2f}x",
        )  # fmt: skip
    return table
