"""Where images come from: folders, tars, timm's readers, datasets."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from sparsiattn.errors import DataError

_READER = re.compile(r"(?i)(hfds|hfids|wds|tfds|torch)/")
_SYNONYMS = (
    {"train", "training"},
    {"val", "valid", "validation", "eval", "evaluation"},
    {"test", "testing"},
)
_SPLITS = set().union(*_SYNONYMS)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Source:
    """items: gives ``(image, label)`` by index, or in a stream. indices: those of the split.
    classes: how many there are, None if unknown. name: of an item, for errors."""

    items: Any
    indices: tuple[int, ...]
    classes: int | None
    name: Callable[[int], str]

    @property
    def streams(self) -> bool:
        return isinstance(self.items, IterableDataset)


class Files(Dataset[Any]):
    """Images of a timm reader, of which none is skipped: one that cannot be read is an error."""

    def __init__(self, reader: Any, mode: str, where: str) -> None:
        self.reader, self.mode, self.where = reader, mode, where
        weakref.finalize(self, _close_tars, reader)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        name = self.reader.filename(index)
        return f"{self.where}: {name or f'image {index}'}"

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        try:
            file, label, *_ = self.reader[index]
            with file, Image.open(file) as image:
                return image.convert(self.mode), label
        except Exception as error:  # PIL's plug-ins raise whatever a broken file makes them raise
            raise DataError(f"{self.name(index)} cannot be read as an image: {error}") from error


def _close_tars(reader: Any) -> None:
    """timm's tar reader leaves the files that it opened to the garbage collector."""
    states = getattr(reader, "tar_state", {})
    states = list(states.values()) if isinstance(states, dict) else [states]
    while states:
        state = states.pop()
        states.extend(state.children.values())
        if state.tf is not None:
            state.tf.close()


def open_source(source: Any, split: str, channels: int, training: bool, seed: int) -> Source:
    """Whatever `loader` takes, ready batches apart."""
    if isinstance(source, Dataset):
        return _dataset(source, type(source).__name__)
    text = str(source)
    made = _create(text, split, channels, training, seed)
    reader = getattr(made, "reader", None)
    if isinstance(made, IterableDataset) or reader is None:
        return _dataset(made, text)
    files = Files(reader, mode_of(channels), text)
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    indices = tuple(_of_split(files, split) if text.endswith(".tar") else range(len(files)))
    return Source(files, indices, len(classes) if classes else None, files.name)


def mode_of(channels: int) -> str:
    """PIL's mode of images with so many channels."""
    if channels not in _MODES:
        raise DataError(
            f"the model takes {channels} channels, image files have one of {sorted(_MODES)}: give "
            "a Dataset of (tensor, label) or ready batches"
        )
    return _MODES[channels]


def is_path(source: Any) -> bool:
    return isinstance(source, (str, PathLike))


def _create(text: str, split: str, channels: int, training: bool, seed: int) -> Any:
    """timm's dataset of a path, or of ``READER/NAME`` or ``READER/NAME@FOLDER``."""
    try:
        from timm.data import create_dataset
    except ImportError as error:
        raise DataError(f"images are read with torchvision: {error}; {INSTALL}") from error

    match = _READER.match(text)
    name, _, root = text.partition("@") if match else ("", "", text)
    if match and match[1].lower() == "wds" and not root:
        name, root = "wds/", text[match.end() :]
    if not match:
        _check_path(Path(text))
    extra = {} if match and match[1].lower() == "torch" else {"input_img_mode": mode_of(channels)}
    try:
        made = create_dataset(name, root or None, split, is_training=training, seed=seed, **extra)
    except Exception as error:  # every reader has its own errors, bare assertions among them
        reason = ": ".join(filter(None, [type(error).__name__, str(error)]))
        raise DataError(f"no images can be read from {text!r}: {reason}") from error
    if not match and Path(text).is_dir() and Path(made.reader.root) == Path(text):
        _refuse_other_splits(Path(text), split)
    return made


INSTALL = "install what training and evaluation need: pip install 'sparsiattn[train]'"


def _check_path(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"no such folder or file: {str(path)!r}. Data is a folder or a .tar with one folder of "
            "images a class, or READER/NAME with a reader of timm (hfds, hfids, wds, tfds, torch) "
            "and, where that needs one, @FOLDER"
        )
    if path.is_file() and path.suffix != ".tar":
        raise DataError(f"{str(path)!r} is neither a folder nor a .tar (unpack .tar.gz and .zip)")


def _refuse_other_splits(folder: Path, split: str) -> None:
    """timm takes the whole folder where it finds no such split: with train and test in one."""
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if inside and all(name.lower() in _SPLITS for name in inside):
        raise _no_split(str(folder), split, inside)


def _no_split(where: str, split: str, there: list[str]) -> DataError:
    return DataError(
        f"{where} has no split {split!r}, only {', '.join(there)}: pass split={there[0]!r} (or on "
        f"the command line --split {there[0]})"
    )


def _of_split(files: Files, split: str) -> list[int]:
    """Images of one split, where the first or second folder in a tar names splits; else all."""
    parts = [PurePosixPath(files.reader.filename(index)).parts for index in range(len(files))]
    for level in (0, 1):
        names = {path[level].lower() if len(path) > level + 1 else "" for path in parts}
        if names <= _SPLITS:
            wanted = next((group for group in _SYNONYMS if split in group), {split})
            found = [i for i, path in enumerate(parts) if path[level].lower() in wanted]
            if not found:
                raise _no_split(files.where, split, sorted(names))
            return found
    return list(range(len(files)))


def _dataset(dataset: Any, where: str) -> Source:
    """A Dataset, of the user or of torchvision, or one of timm's streams."""
    reader = getattr(dataset, "reader", dataset)
    classes = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    count = len(classes) if isinstance(classes, (list, tuple, dict)) and classes else None

    def name(index: int) -> str:
        return f"{where}: image {index}"

    if isinstance(dataset, IterableDataset):
        return Source(dataset, (), count, name)
    try:
        size = len(dataset)
    except TypeError as error:
        raise DataError(f"{where} must have a length: {error}") from error
    return Source(dataset, tuple(range(size)), count, name)
