"""Progress bars, on stderr, for what takes more than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[..., Any]


@contextmanager
def bar(title: str, total: int | None = None, *, shown: bool = True) -> Iterator[Advance]:
    """A bar while the block runs; call what it gives with how much is done, and the total where it
    was not known before.

    >>> with bar("working", 2, shown=False) as advance:
    ...     advance(1)
    """
    if not shown:
        yield lambda done, total=None: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown_bar:
        task = shown_bar.add_task(title, total=total)
        yield lambda done, total=total: shown_bar.update(task, completed=done, total=total)
