"""Small image data sets on disk, made with PIL alone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


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
