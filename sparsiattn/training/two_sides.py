"""A model, dense and patched, on the same batches of `evaluate`, and what one process counts."""

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
    """What one process counted.

    Attributes:
        counts: Images, and right answers by side and kind.
        classes: Of the head.
        times: Images and seconds of every batch, by side.
        values: Of the metric, by image.
        metric: What was measured, as `Evaluation` has it.
        guessed: Whether the model decided that.
    """

    counts: Counter[str] = field(default_factory=Counter)
    classes: int = 0
    times: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    metric: str = "labels"
    guessed: bool = False

    def speed(self, side: str) -> float:
        """Median images a second of whole batches, without the first, which warms up, if it can be
        spared; 0 if there was none."""
        times = self.times.get(side, [])
        speeds = [images / seconds for images, seconds in times if images == max(times)[0]]
        return median(speeds[1:] if len(speeds) > 2 else speeds or [0.0])

    def ratios(self) -> list[float]:
        """Dense over patched seconds of every whole batch, without the first if there are more."""
        pairs = list(zip(self.times.get("dense", ()), self.times.get("patched", ()), strict=False))
        whole = max((images for (images, _), _ in pairs), default=0)
        ratios = [one / other for (images, one), (_, other) in pairs if images == whole]
        return ratios[1:] or ratios

    def count_labels(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """Right answers of both sides."""
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
    """A model, dense and patched, on the same batches."""

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
                f"dense one, and this {type(model).__name__} has no patch: call "
                "sparsiattn.patch(model, ...) first, or give it a head and labelled images"
            )

    @property
    def counts_labels(self) -> bool:
        """Whether labels are looked at, as far as is known."""
        return self.metric is None

    def run(self, images: Tensor, labels: Tensor) -> None:
        """Both sides of one batch; ``labels`` of its first images, which alone count."""
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
    """A number for every image of a batch."""
    if not isinstance(values, Tensor):
        return [values] * images
    if len(values) != images:
        raise DataError(
            f"metric(dense, patched) gave {len(values)} values for {images} images: return one for "
            "each image [B], or one number"
        )
    return [float(value) for value in values]
