"""What every command shares: tables, lines and errors on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def cells(rows: list[tuple[str, ...]]) -> Table:
    """The first row is the heading; all but the first column are figures."""
    from rich.table import Table

    heading, *body = rows
    table = Table(heading[0])
    for title in heading[1:]:
        table.add_column(title, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def print_whole(console: Any, table: Table) -> None:
    """With no cell cut short, also where the screen is small: `patch` takes a site's whole name."""
    from rich.console import Console
    from rich.measure import Measurement

    unlimited = console.options.update(width=10_000)
    needed = Measurement.get(console, unlimited, table).maximum
    Console(width=max(console.width, needed)).print(table)


def say(console: Any, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class readable:
    """Errors of this library as one line and exit code 1, without a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from sparsiattn.errors import SparsiattnError

        if isinstance(error, SparsiattnError):
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error
