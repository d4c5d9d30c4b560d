"""How far something is that takes more than a moment, for callers and as a bar on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """Called with how much is done and how much there is in all, None if that is unknown."""

    def __call__(self, done: int, total: int | None = None, /) -> Any: ...


@contextmanager
def bar(title: str, total: int | None = None, *, shown: bool = True) -> Iterator[Progress]:
    """A progress bar while the block runs.

    Args:
        title: Says what is done.
        total: How much there is to do; the callback may say it later.
        shown: Whether there is a bar at all.

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
