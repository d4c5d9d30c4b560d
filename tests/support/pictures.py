"""Small image data sets, on disk and in memory, made with PIL alone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset


def picture(number: int, size: int = 32) -> Image.Image:
    """An image of noise, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder(root: Path, classes: int = 5, each: int = 3, size: int = 32) -> Path:
    """ImageFolder layout: ``c0/0.png`` ..."""
    for label in range(classes):
        place = root / f"c{label}"
        place.mkdir(parents=True)
        for index in range(each):
            picture(100 * label + index, size).save(place / f"{index}.png")
    return root


def tar(path: Path, splits: tuple[str, ...] = ("",), classes: int = 5, each: int = 3) -> Path:
    """The same in a tar, below folders of splits or not; the images of each split are others."""
    with tarfile.open(path, "w") as archive:
        for turn, split in enumerate(splits):
            for label in range(classes):
                for index in range(each):
                    data = io.BytesIO()
                    picture(1000 * turn + 100 * label + index).save(data, "PNG")
                    info = tarfile.TarInfo(
                        "/".join([*filter(None, [split]), f"c{label}", f"{index}.png"])
                    )
                    info.size = data.tell()
                    data.seek(0)
                    archive.addfile(info, data)
    return path


def pixels(image: Any) -> torch.Tensor:
    """``[3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)


class Pictures(Dataset[Any]):
    """(PIL image, label), `give` made of it."""

    def __init__(self, count: int = 6, give: Any = lambda image: image, labels: int = 5) -> None:
        self.count, self.give, self.labels = count, give, labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.give(picture(index)), index % self.labels


class Flow(IterableDataset[Any]):
    def __init__(self, count: int = 7) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return ((picture(index), index % 5) for index in range(self.count))


def labels_of(batches: Any) -> list[int]:
    return [label for _, labels in batches for label in labels.tolist()]


def everything(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)
