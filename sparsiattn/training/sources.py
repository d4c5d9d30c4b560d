"""Where images come from, and the sample that each becomes, the same for the same (seed, epoch)."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparsiattn.errors import DataError
from sparsiattn.training.preprocess import seeded

Sample = tuple[Tensor, int, tuple[int, ...]]
"""Image ``[C, H, W]``, label, and its place: (epoch, index)."""

INSTALL = "install what training and evaluation need: pip install 'sparsiattn[train]'"
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
        items: Gives ``(image, label)`` by index, or in a stream.
        indices: Those of the split.
        classes: Number of classes, None if unknown.
        name: Names an item, for errors.
    """

    items: Any
    indices: tuple[int, ...]
    classes: int | None
    name: Callable[[int], str]

    @property
    def streams(self) -> bool:
        """Whether items come in a stream."""
        return isinstance(self.items, IterableDataset)


class Files(Dataset[Any]):
    """Images of a timm reader, of which none is skipped: one that cannot be read is an error."""

    def __init__(self, reader: Any, mode: str, where: str) -> None:
        self.reader, self.mode, self.where = reader, mode, where
        weakref.finalize(self, _close_tars, reader)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Of an image, for errors."""
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
    path = str(source)
    dataset = _timm_dataset(path, split, channels, training, seed)
    reader = getattr(dataset, "reader", None)
    if isinstance(dataset, IterableDataset) or reader is None:
        return _dataset(dataset, path)
    files = Files(reader, mode_of(channels), path)
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    indices = tuple(_of_split(files, split) if path.endswith(".tar") else range(len(files)))
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
    """Whether a source is a path or a reader's name."""
    return isinstance(source, (str, PathLike))


def _timm_dataset(path: str, split: str, channels: int, training: bool, seed: int) -> Any:
    """timm's dataset of a path, or of ``READER/NAME`` or ``READER/NAME@FOLDER``."""
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
    except Exception as error:  # every reader has its own errors, bare assertions among them
        reason = ": ".join(filter(None, [type(error).__name__, str(error)]))
        raise DataError(f"no images can be read from {path!r}: {reason}") from error
    if not match and Path(path).is_dir() and Path(dataset.reader.root) == Path(path):
        _refuse_other_splits(Path(path), split)
    return dataset


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
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if names and all(name.lower() in _SPLITS for name in names):
        raise _no_split(str(folder), split, names)


def _no_split(where: str, split: str, names: list[str]) -> DataError:
    return DataError(
        f"{where} has no split {split!r}, only {', '.join(names)}: pass split={names[0]!r} (or on "
        f"the command line --split {names[0]})"
    )


def _of_split(files: Files, split: str) -> list[int]:
    """Images of one split, where the first or second folder in a tar names splits; else all."""
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


@dataclass(frozen=True)
class Finish:
    """Makes a sample of an image and its label.

    Attributes:
        transform: PIL image to tensor ``[C, H, W]``.
        channels: Of images.
        classes: Of the model's head, None if unknown.
        seed: Augmentation depends on it.
        training: Whether the transform draws random numbers.
        labels: Whether labels matter; else none is looked at and all are 0.
    """

    transform: Callable[[Any], Tensor]
    channels: int
    classes: int | None = None
    seed: int = 0
    training: bool = False
    labels: bool = True

    def seeded(self, where: tuple[int, ...]) -> AbstractContextManager[None]:
        """Random numbers of one sample; a dataset's own transform draws them as well."""
        return seeded(self.seed, *where) if self.training else nullcontext()

    def __call__(self, item: Any, name: str, where: tuple[int, ...]) -> Sample:
        pair = isinstance(item, (tuple, list))
        if not self.labels:
            return self._image(item[0] if pair else item, name).float(), 0, where
        if not pair or len(item) < 2:
            raise DataError(f"{name}: (image, label) is needed, got {type(item).__name__}")
        label = self._label(item[1], name)
        return self._image(item[0], name).float(), label, where

    def _image(self, image: Any, name: str) -> Tensor:
        from PIL import Image
        from torchvision.transforms.functional import to_pil_image

        if isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3:
            return image  # finished by the dataset's own transform
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
            image = to_pil_image(image)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise DataError(
                f"{name}: a PIL image or a tensor [C, H, W] (uint8, or float and normalised) is "
                f"needed, got {type(image).__name__}"
            )
        mode = mode_of(self.channels)
        return self.transform(image if image.mode == mode else image.convert(mode))

    def _label(self, label: Any, name: str) -> int:
        try:
            value = int(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}: the label must be a class index, got {label!r}") from error
        check_label(value, value, self.classes, name)
        return value


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Raise `DataError` where class indices of a batch do not fit the head.

    Checked while they are on the CPU: elsewhere it would wait for the device, and on a GPU torch's
    own check ends the process.
    """
    if labels.numel():
        check_label(int(labels.min()), int(labels.max()), classes, "a batch")


def check_label(low: int, high: int, classes: int | None, name: str) -> None:
    """Raise `DataError` where labels from ``low`` to ``high`` do not fit the head."""
    if low < 0:
        raise DataError(f"{name} has label {low}: it is not labelled, and no class is below 0")
    if classes is not None and high >= classes:
        raise DataError(
            f"{name} has label {high}, but the model's head tells {classes} classes apart (0 to "
            f"{classes - 1}): make a model with such a head, timm.create_model(..., "
            f"num_classes={high + 1} or more), or give the data it was made for"
        )


class Samples(Dataset[Sample]):
    """Samples by ``(epoch, index)``."""

    def __init__(self, source: Source, finish: Finish) -> None:
        self.source, self.finish = source, finish

    def __len__(self) -> int:
        return len(self.source.items)

    def __getitem__(self, where: tuple[int, int]) -> Sample:
        index = where[1]
        with self.finish.seeded(where):
            return self.finish(self.source.items[index], self.source.name(index), where)


class SampleStream(IterableDataset[Sample]):
    """Samples in the order of the source."""

    def __init__(self, inner: Any, finish: Finish, share: tuple[int, int], workers: int) -> None:
        self.inner, self.finish, self.share, self.epoch = inner, finish, share, 0
        reader: Any = getattr(inner, "reader", None)
        if hasattr(reader, "dist_num_replicas"):
            # timm's readers would split streams among processes, and repeat or lose images
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        if hasattr(inner, "set_loader_cfg"):
            inner.set_loader_cfg(num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        """Which order and augmentation come next."""
        self.epoch = epoch
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        count = len(self.inner)
        if not count:
            raise TypeError("this stream does not know how many images it has")
        return -(-count // self.share[1])

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        rank, world = self.share
        for count, item in enumerate(self.inner):
            if count % world == rank:
                where = (self.epoch, worker, count)
                with self.finish.seeded(where):
                    sample = self.finish(item, f"image {count} of the stream", where)
                yield sample
