"""Planners calibrated, and whole models trained, before they are measured; each kept on disk, so
that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import torch
from methods import Method
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsiattn

STEPS, BATCH = 200, 64


@dataclass
class Bench:
    """Where weights lie, the training images, and where fits are kept."""

    weights: Path
    images: Tensor
    labels: Tensor
    work: Path

    @contextmanager
    def patched(self, method: Method) -> Iterator[nn.Module]:
        """The model of a row, ready to be measured."""
        model = cifar.load(self.weights)
        if method.strategy == "dense":
            yield model
            return
        if method.fit == "trained":
            self._train(model, method)
        with sparsiattn.patch(model, method.strategy, **method.options) as live:
            if method.fit == "calibrated":
                self._calibrate(live, method)
            yield model

    def _calibrate(self, live: sparsiattn.Patch, method: Method) -> None:
        """Planners know neither budget nor background: one fit serves all rows of a tile."""
        tile = str(method.options["tile"])
        path = self.work / f"calibrated-{tile}-{method.seed}.safetensors"
        if not path.exists():
            sparsiattn.calibrate(live.model, self._batches(method.seed or 0), steps=STEPS)
            save_file(_planners(live.model), path)
        live.model.load_state_dict(load_file(path), strict=False)

    def _batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for pick in torch.randperm(len(self.images), generator=generator).split(BATCH):
            yield cifar.normalise(self.images[pick])

    def _train(self, model: nn.Module, method: Method) -> None:
        raise NotImplementedError


def _planners(model: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if ".sparsiattn." in k}
