"""The two sides of `evaluate`, a model dense and patched, and the counts of one process."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.model_call import logits_of
from sparsiattn.patching.model_outputs import (
    Metric,
    OutputMetric,
    is_headless,
    refuse_headless,
    says_headless,
)
from sparsiattn.runtime.timing import timed
from sparsiattn.training.samples import check_labels


@dataclass
class Tally:
    """The counts of one process.

    Attributes:
        counts: Number of images, and of correct predictions by side and kind.
        classes: Number of classes of the head.
        times: By side, number of images and time in seconds of every batch.
        values: Value of the metric for each image.
        metric: The kind of comparison, as in `Evaluation`.
        guessed: Whether the metric was chosen by the kind of model.
    """

    counts: Counter[str] = field(default_factory=Counter)
    classes: int = 0
    times: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    metric: str = "labels"
    guessed: bool = False

    def speed(self, side: str) -> float:
        """Median images per second of full batches; 0 without a batch.

        The first batch, a warm-up, is left out if there are enough others.
        """
        times = self.times.get(side, [])
        speeds = [images / seconds for images, seconds in times if images == max(times)[0]]
        return median(speeds[1:] if len(speeds) > 2 else speeds or [0.0])

    def ratios(self) -> list[float]:
        """Dense time divided by patched time of every full batch, without the first if possible."""
        pairs = list(zip(self.times.get("dense", ()), self.times.get("patched", ()), strict=False))
        full = max((images for (images, _), _ in pairs), default=0)
        ratios = [dense / patched for (images, dense), (_, patched) in pairs if images == full]
        return ratios[1:] or ratios

    def count_labels(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """Count the correct predictions of both sides."""
        if labels.is_floating_point():
            raise DataError(f"labels must be class indices (int64), got {labels.dtype}")
        self.classes = logits["dense"].shape[1]
        check_labels(labels, self.classes)
        first: dict[str, Tensor] = {}
        for side, rows in logits.items():
            choices = rows.float().topk(min(5, self.classes), dim=1).indices
            choices = choices.masked_fill(rows.isnan().any(1, keepdim=True), -1)
            right = choices == labels.to(choices.device)[:, None]
            first[side] = choices[:, 0]
            self.counts[f"{side} top1"] += int(right[:, 0].sum())
            self.counts[f"{side} top5"] += int(right.sum())
        if "patched" in first:
            same = (first["patched"] == first["dense"]) & (first["dense"] >= 0)
            self.counts["agreement"] += int(same.sum())


class Sides:
    """Runs a model, dense and patched, on the same batches."""

    def __init__(self, model: nn.Module, patch: Patch | None, metric: Metric | None) -> None:
        self.model, self.patch, self.tally = model, patch, Tally()
        self.metric = None if metric is None else OutputMetric.named(metric)
        if metric is None and says_headless(model):
            self.metric = OutputMetric("features", guessed=True)
        if metric == "classes":
            refuse_headless(model)
        if self.metric is not None and patch is None:
            raise InvalidOption(
                f"evaluate() compares the {self.metric.kind} of a patched model with those of the "
                f"dense one, but this {type(model).__name__} is not patched: call "
                "sparsiattn.patch(model, ...) first, or pass a model with a head and labelled "
                "images"
            )

    @property
    def counts_labels(self) -> bool:
        """Whether labels are read, as far as is known before the first batch."""
        return self.metric is None

    def run(self, images: Tensor, labels: Tensor) -> None:
        """Run both sides on one batch.

        Args:
            images: ``[B, C, H, W]``.
            labels: Labels of the first images; the images after them only pad the batch.
        """
        patch, times, outputs = self.patch, self.tally.times, {}
        sides = ["dense"] if patch is None else ["dense", "patched"]
        for side in sides if len(times.get("dense", ())) % 2 == 0 else sides[::-1]:
            with patch.disabled() if patch is not None and side == "dense" else nullcontext():
                outputs[side], seconds = timed(lambda: self._call(images))
            times.setdefault(side, []).append((len(images), seconds))
        if len(labels):
            self._count(outputs, labels)

    def _call(self, images: Tensor) -> Any:
        if self.metric is None:
            return self.model(images)
        return self.metric.outputs(self.model, (images,), {})

    def _count(self, outputs: dict[str, Any], labels: Tensor) -> None:
        tally, model, count = self.tally, self.model, len(labels)
        undecided = self.metric is None and not tally.counts["images"]
        if undecided and self.patch is not None and is_headless(model, outputs["dense"]):
            self.metric = OutputMetric("features", guessed=True)
        tally.counts["images"] += count
        if self.metric is None:
            logits = {side: logits_of(output, model)[:count] for side, output in outputs.items()}
            tally.count_labels(logits, labels)
            return
        tally.metric, tally.guessed = self.metric.kind, self.metric.guessed
        values = self.metric.compare(model, outputs["dense"], outputs["patched"])
        tally.values += _by_image(values, tally.times["dense"][-1][0])[:count]


def _by_image(values: Tensor | float, images: int) -> list[float]:
    """One number for every image of a batch."""
    if not isinstance(values, Tensor):
        return [values] * images
    if len(values) != images:
        raise DataError(
            f"metric(dense, patched) must return one value for each image [B] or one number, got "
            f"{len(values)} values for {images} images"
        )
    return [float(value) for value in values]
