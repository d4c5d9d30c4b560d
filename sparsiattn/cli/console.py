"""What every command shares: tables, lines and errors on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sparsiattn.errors import InvalidOption, SparsiattnError

if TYPE_CHECKING:
    from rich.table import Table


def table_of(rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first row is the heading; all but the first column are figures."""
    from rich.table import Column, Table

    (first, *figures), *body = rows
    table = Table(first, *(Column(title, justify="right") for title in figures))
    for row in body:
        table.add_row(*row)
    return table


def print_result(as_json: bool, document: Any, *parts: Any, indent: int | None = 2) -> None:
    """Print what a command has to say.

    Args:
        as_json: Whether ``--json`` was given.
        document: All of it as plain data.
        *parts: The same for people: tables of `rich`, tables as lists of rows with a heading first,
            and anything else as `print` shows it; what is empty is left out.
        indent: Spaces by level of the document; None for one line.
    """
    if as_json:
        print(json.dumps(document, indent=indent))
        return
    from rich.console import Console
    from rich.table import Table

    for part in filter(None, parts):
        if isinstance(part, list):
            # wider than any table: `patch` takes a site's whole name, so none may be cut short
            Console(width=10_000).print(table_of(part))
        elif isinstance(part, Table):
            Console().print(part)
        else:
            print(part)


def check_file(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        InvalidOption: It is a folder, or its own folder cannot be written to.
    """
    if path is not None:
        if path.is_dir():
            raise InvalidOption(f"--out must be a file, got the folder {path}")
        check_folder(path.parent)


def check_folder(path: Path) -> None:
    """The same for a folder, which is made later where it is not there.

    Raises:
        InvalidOption: It can neither be written to nor be made.
    """
    absolute = path.absolute()
    nearest = next(place for place in (absolute, *absolute.parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise InvalidOption(f"--out must be where you may write, which {nearest} is not")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Errors of this library and of files as one line and exit code 1, without a traceback."""
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe has gone; typer ends in silence
        raise
    except (SparsiattnError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
