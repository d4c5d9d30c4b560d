"""Progress of long operations, as a callback and as a bar on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """A callback that gets the number of items done and the total; None if it is unknown."""

    def __call__(self, done: int, total: int | None = None, /) -> Any: ...


@contextmanager
def bar(title: str, total: int | None = None, *, shown: bool = True) -> Iterator[Progress]:
    """Show a progress bar while the block runs.

    Args:
        title: Text next to the bar.
        total: Number of items; the callback may set it later.
        shown: Whether to show the bar.

    >>> with bar("working", 2, shown=False) as progress:
    ...     progress(1)
    """
    if not shown:
        yield lambda done, total=None: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (*RichProgress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as shown_bar:
        task = shown_bar.add_task(title, total=total)
        yield lambda done, total=total: shown_bar.update(task, completed=done, total=total)
