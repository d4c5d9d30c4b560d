"""Files and folders that are the old or the new ones after a kill at any moment, never a mixture.

Kernels are the lowest layer that writes files, so the functions live here.
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
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(new: Path, target: Path) -> None:
    """Put a finished file, of the same file system, in the place of another."""
    sync(new)
    os.replace(new, target)
    sync(target.parent)


@contextmanager
def replacing(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """Replace a file by what the block writes to the path that it gets.

    Args:
        target: The file. It stays as it is if the block fails.
        shared: Whether other processes may replace it at the same time. Each then needs a
            temporary file of its own; with a fixed name, the next run cleans up after a kill.

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
    """Replace a folder by a new one that ``fill`` writes its files into.

    No system replaces a folder that has files in one step, so a kill may come while the old one
    has another name: call `recover_folder` before looking for it.
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
