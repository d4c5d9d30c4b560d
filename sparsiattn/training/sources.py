"""Sources of images: folders, tars, readers of timm, and datasets."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from sparsiattn.errors import DataError

INSTALL = "install the dependencies of training and evaluation: pip install 'sparsiattn[train]'"
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
    """Images with their labels.

    Attributes:
        items: A dataset of ``(image, label)``, by index or as a stream.
        indices: Indices of the split; empty for streams.
        classes: Number of classes; None if unknown.
        where: Name of the source, for error messages.
    """

    items: Any
    indices: tuple[int, ...]
    classes: int | None
    where: str

    @property
    def streams(self) -> bool:
        """Whether the items are a stream."""
        return isinstance(self.items, IterableDataset)

    def name(self, index: int) -> str:
        """Name of an item, for error messages."""
        if isinstance(self.items, Files):
            return self.items.name(index)
        return f"{self.where}: image {index}"


class Files(Dataset[Any]):
    """Images of a timm reader. An image that cannot be read is an error, and is not skipped."""

    def __init__(self, reader: Any, mode: str, where: str) -> None:
        self.reader, self.mode, self.where = reader, mode, where
        weakref.finalize(self, _close_tars, reader)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Name of an image, for error messages."""
        name = self.reader.filename(index)
        return f"{self.where}: {name or f'image {index}'}"

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        try:
            file, label, *_ = self.reader[index]
            with file, Image.open(file) as image:
                return image.convert(self.mode), label
        except Exception as error:  # PIL's plug-ins raise many kinds of errors for broken files
            raise DataError(f"{self.name(index)} cannot be read as an image: {error}") from error


def _close_tars(reader: Any) -> None:
    """Close the files that timm's tar reader opened, which it never closes itself."""
    states = getattr(reader, "tar_state", {})
    states = list(states.values()) if isinstance(states, dict) else [states]
    while states:
        state = states.pop()
        states.extend(state.children.values())
        if state.tf is not None:
            state.tf.close()


def open_source(source: Any, split: str, channels: int, training: bool, seed: int) -> Source:
    """Open any source that `loader` takes, except an iterable of batches."""
    dataset, where = source, type(source).__name__
    if not isinstance(source, Dataset):
        where = str(source)
        dataset = _timm_dataset(where, split, channels, training, seed)
        reader = getattr(dataset, "reader", None)
        if reader is not None and not isinstance(dataset, IterableDataset):
            dataset = Files(reader, mode_of(channels), where)
    classes = _class_count(dataset)
    if isinstance(dataset, IterableDataset):
        return Source(dataset, (), classes, where)
    try:
        indices = tuple(range(len(dataset)))
    except TypeError as error:
        raise DataError(f"{where} must have a length: {error}") from error
    if isinstance(dataset, Files) and where.endswith(".tar"):
        indices = tuple(_of_split(dataset, split))
    return Source(dataset, indices, classes, where)


def _class_count(dataset: Any) -> int | None:
    """Number of classes, if a dataset (of torchvision or the user) or timm's reader has it."""
    reader = getattr(dataset, "reader", dataset)
    places = (dataset, "classes"), (reader, "class_to_idx"), (reader, "class_name_to_idx")
    for owner, name in places:
        classes = getattr(owner, name, None)
        if isinstance(classes, (list, tuple, dict)) and classes:
            return len(classes)
    return None


def mode_of(channels: int) -> str:
    """PIL's image mode for a number of channels."""
    if channels not in _MODES:
        raise DataError(
            f"the model takes {channels} channels, but image files have one of {sorted(_MODES)}: "
            "pass a Dataset of (tensor, label) or an iterable of batches"
        )
    return _MODES[channels]


def is_path(source: Any) -> bool:
    """Whether a source is a path or the name of a reader."""
    return isinstance(source, (str, PathLike))


def _timm_dataset(path: str, split: str, channels: int, training: bool, seed: int) -> Any:
    """timm's dataset for a path, or for ``READER/NAME`` or ``READER/NAME@FOLDER``."""
    try:
        from timm.data import create_dataset
    except ImportError as error:
        raise DataError(f"images are read with torchvision: {error}; {INSTALL}") from error

    match = _READER.match(path)
    name, _, root = path.partition("@") if match else ("", "", path)
    if match and match[1].lower() == "wds" and not root:
        name, root = "wds/", path[match.end() :]
    if not match:
        _check_path(Path(path))
    mode = {} if match and match[1].lower() == "torch" else {"input_img_mode": mode_of(channels)}
    try:
        dataset = create_dataset(name, root or None, split, is_training=training, seed=seed, **mode)
    except Exception as error:  # every reader has its own errors, including bare assertions
        reason = ": ".join(filter(None, [type(error).__name__, str(error)]))
        raise DataError(f"no images can be read from {path!r}: {reason}") from error
    if not match and Path(path).is_dir() and Path(dataset.reader.root) == Path(path):
        _refuse_other_splits(Path(path), split)
    return dataset


def _check_path(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"no such folder or file: {str(path)!r}. Data must be a folder or a .tar of "
            "images (for labels: one folder per class), or READER/NAME with a reader of timm "
            "(hfds, hfids, wds, tfds, torch), followed by @FOLDER if the reader needs one"
        )
    if path.is_file() and path.suffix != ".tar":
        raise DataError(
            f"data must be a folder or a .tar, got {str(path)!r}: unpack .tar.gz and .zip first"
        )


def _refuse_other_splits(folder: Path, split: str) -> None:
    """Refuse a folder without the split: timm would use all splits in it together."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if names and all(name.lower() in _SPLITS for name in names):
        raise _no_split(str(folder), split, names)


def _no_split(where: str, split: str, names: list[str]) -> DataError:
    return DataError(
        f"{where} has no split {split!r}, only {', '.join(names)}: pass split={names[0]!r} (or on "
        f"the command line --split {names[0]})"
    )


def _of_split(files: Files, split: str) -> list[int]:
    """Indices of one split, if the first or second folder in a tar names splits; else of all."""
    paths = [PurePosixPath(files.reader.filename(index)).parts for index in range(len(files))]
    for level in (0, 1):
        names = [path[level].lower() if len(path) > level + 1 else "" for path in paths]
        if set(names) <= _SPLITS:
            synonyms = next((group for group in _SYNONYMS if split in group), {split})
            indices = [index for index, name in enumerate(names) if name in synonyms]
            if not indices:
                raise _no_split(files.where, split, sorted(set(names)))
            return indices
    return list(range(len(files)))
