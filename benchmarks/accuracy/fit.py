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
from methods import Method, text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsiattn
from sparsiattn import Recipe
from sparsiattn.training import Stage

STEPS, BATCH, LR = 300, 64, 1e-2
TRAINED = Stage(
    name="backbone", trainable="backbone", steps=400, warmup_steps=20, lr=1.5e-4, min_lr=2e-6,
    weight_decay=0.05, clip=1.0, ce=1.0, label_smoothing=0.1, kl=0.5, token_mse=0.5,
)  # fmt: skip


@dataclass
class BenchResult:
    """Where weights lie, the training images, and where fits are kept."""

    weights: Path
    images: Tensor
    labels: Tensor
    work: Path

    @contextmanager
    def patched(self, method: Method) -> Iterator[nn.Module | None]:
        """The model of a row, ready to be measured; None where nothing in it can be calibrated."""
        model = cifar.load(self.weights)
        if method.strategy == "dense" and method.fit == "none":
            yield model
            return
        options = dict(method.options)
        if method.strategy == "connectivity" and method.fit != "none":
            options["scores"] = "predictor"  # also where ranking by logits would lose less
        with sparsiattn.patch(model, method.strategy, **options) as live:
            if method.fit == "calibrated" and not live.has_learned_planners:
                yield None
                return
            if method.fit != "none" and live.has_learned_planners:
                self._calibrate(live, method)
            if method.fit == "trained":
                self._train(live, method)
            yield model

    def _calibrate(self, live: sparsiattn.Patch, method: Method) -> None:
        """Planners know neither budget nor background: one fit serves all rows of a tile whose
        planners have one shape. A hybrid takes that of all tokens, and chooses among those left."""
        path = self.work / f"{self._shared(live, method)} seed={method.seed}.safetensors"
        if not path.exists():
            assert method.strategy != "hybrid"
            images = Batches(self.images, self.labels, method.seed or 0)
            sparsiattn.calibrate(live.model, images, steps=STEPS, lr=LR)
            save_file(_planners(live.model), path)
        found = live.model.load_state_dict(load_file(path), strict=False)
        assert not found.unexpected_keys, found.unexpected_keys

    @staticmethod
    def _shared(live: sparsiattn.Patch, method: Method) -> str:
        """What methods have in common whose planners are the same."""
        if method.strategy not in ("connectivity", "hybrid"):
            return f"calibrated {method.strategy}"
        rows, basis = next(t.shape for n, t in _planners(live.model).items() if ".down" in n)
        return f"calibrated {text(method.options.get('tile', 1))} {rows}x{basis}"

    def _train(self, live: sparsiattn.Patch, method: Method) -> None:
        """The second stage of Sparsifiner's recipe, shortened: the first was the calibration."""
        path = self.work / f"{method.name}.safetensors"
        if not path.exists():
            recipe = Recipe(stages=(TRAINED,), batch_size=BATCH, seed=method.seed or 0)
            data = Batches(self.images, self.labels, method.seed or 0)
            sparsiattn.train(live.model, data, recipe=recipe)
            save_file(live.model.state_dict(), path)
        live.model.load_state_dict(load_file(path))


@dataclass
class Batches:
    """Augmented training batches; the order of an epoch depends on the seed and the epoch alone."""

    images: Tensor
    labels: Tensor
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        for pick in order[: len(self) * BATCH].view(-1, BATCH):
            images = cifar.augment(self.images[pick], cifar.SIDE, generator)
            yield cifar.normalise(images), self.labels[pick]


def _planners(model: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if ".sparsiattn." in k}
