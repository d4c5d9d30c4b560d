"""Atomic writes: after a kill at any moment, files and folders are the old or the new ones.

The functions are in this package because kernels are the lowest layer that writes files.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(new: Path, target: Path) -> None:
    """Move a finished file over another one; both must be on the same file system."""
    sync(new)
    os.replace(new, target)
    sync(target.parent)


@contextmanager
def replacing(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """Context manager that yields a temporary path and then moves it over ``target``.

    Args:
        target: The file. It stays unchanged if the block fails.
        shared: Whether other processes may replace it at the same time. Each process then uses
            its own temporary file. Otherwise the name is fixed, so that the next run overwrites
            what a kill has left.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("new")
    ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
    [('a.txt', 'new')]
    """
    suffix = f"{secrets.token_hex(4)}.new" if shared else "new"
    temporary = target.with_name(f"{target.name}.{suffix}")
    try:
        yield temporary
        replace_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder by a new one, whose files ``fill`` writes.

    No system can replace a non-empty folder in one step, so a kill may leave the old folder under
    another name: call `recover_folder` before reading the folder.
    """
    new = target.with_name(f"{target.name}.new")
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        fill(new)
        for path in (*new.iterdir(), new):
            sync(path)
        if target.exists():
            target.rename(_old(target))
        new.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(_old(target), ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put the old folder back if a kill came between the two renames of `replace_folder`."""
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)
    shutil.rmtree(_old(target), ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")
