"""What every command shares: tables, lines and errors on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sparsiattn.errors import SparsiattnError

if TYPE_CHECKING:
    from rich.table import Table


def table_of(rows: list[tuple[str, ...]]) -> Table:
    """A table whose first row is the heading; all but the first column are figures."""
    from rich.table import Table

    heading, *body = rows
    table = Table(heading[0])
    for title in heading[1:]:
        table.add_column(title, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def print_uncut(console: Any, table: Table) -> None:
    """Print a table with no cell cut short, also where the screen is small.

    `patch` takes a site's whole name, so users must be able to copy it.
    """
    from rich.console import Console
    from rich.measure import Measurement

    unlimited = console.options.update(width=10_000)
    needed = Measurement.get(console, unlimited, table).maximum
    Console(width=max(console.width, needed)).print(table)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Errors of this library as one line and exit code 1, without a traceback."""
    try:
        yield
    except SparsiattnError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
