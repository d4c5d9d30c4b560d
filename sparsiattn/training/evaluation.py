"""`evaluate`: compare a patched model with its dense path in one pass over the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching.handle import patch_of
from sparsiattn.patching.model_call import eval_mode
from sparsiattn.patching.model_outputs import Metric
from sparsiattn.runtime.timing import Quartiles
from sparsiattn.training import processes
from sparsiattn.training.data import loader
from sparsiattn.training.preprocess import Preprocessing
from sparsiattn.training.progress import Progress
from sparsiattn.training.sources import is_path
from sparsiattn.training.two_sides import Sides, Tally


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Figures that were not measured, or that need a patch, are None.

    Attributes:
        images: Number of images.
        top1: Top-1 accuracy of the patched model, in per cent.
        top5: Top-5 accuracy of the patched model, in per cent; None below five classes.
        dense_top1: Top-1 accuracy of the dense model, in per cent.
        dense_top5: Top-5 accuracy of the dense model, in per cent; None below five classes.
        agreement: Share of images with the same first choice in both models, in per cent.
        images_per_second: Throughput of the patched model without reading images: the median over
            batches, summed over processes.
        dense_images_per_second: Throughput of the dense model, likewise.
        metric: The kind of comparison: ``"labels"`` (accuracy), ``"classes"``, ``"features"`` or
            ``"callable"``, see `evaluate`.
        metric_guessed: Whether the metric was chosen by the kind of model, not by the caller.
        similarity_mean: Mean of the metric over images; 1 is identical for the built-in metrics.
        similarity_median: Median of the metric.
        similarity_p5: 5th percentile of the metric: 5 % of the images are below it.
        speedup: Time of the dense model divided by that of the patched one, the median over batches
            that ran through both in alternation; 2.0 is twice as fast.
        speedup_quartiles: First and third quartile of that ratio.
        speedup_batches: Number of batches that the ratio is based on; partial batches and the first
            batch do not count.
        images_from: ``"files"``, ``"dataset"`` or ``"batches"``, which are used unchanged.
        preprocessing: The preprocessing of files and of dataset items that are not preprocessed
            tensors; None for batches.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=1.0) as patch:
    ...     result = evaluate(patch.model, [tiny_images(4)], metric="classes")
    >>> result.metric, result.agreement, result.similarity_mean
    ('classes', 100.0, 1.0)
    """

    images: int
    top1: float | None
    top5: float | None
    dense_top1: float | None
    dense_top5: float | None
    agreement: float | None
    images_per_second: float | None
    dense_images_per_second: float
    metric: str = "labels"
    metric_guessed: bool = False
    similarity_mean: float | None = None
    similarity_median: float | None = None
    similarity_p5: float | None = None
    speedup: float | None = None
    speedup_quartiles: tuple[float, float] | None = None
    speedup_batches: int = 0
    images_from: str = "batches"
    preprocessing: Preprocessing | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        dense = _accuracy(self.dense_top1, self.dense_top5)
        lines = [f"{self.images} images", f"dense    {dense}{self._speed(dense=True)}"]
        if self.images_per_second is not None:
            patched = f"{_accuracy(self.top1, self.top5)}{self._speed(dense=False)}"
            if self.agreement is not None:
                patched += f", {self.agreement:.2f} % agree with dense"
            lines += [f"patched  {patched}", *self._similarity(), *self._ratio()]
        return "\n".join([*lines, f"read     {self._reading()}"])

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def _speed(self, *, dense: bool) -> str:
        return f"{self.dense_images_per_second if dense else self.images_per_second:.1f} images/s"

    def _similarity(self) -> list[str]:
        if self.similarity_mean is None:
            return []
        name = {"features": "cosine of features", "classes": "first choices kept"}
        guess = " (chosen automatically, metric= sets another)" if self.metric_guessed else ""
        return [
            f"kept     {name.get(self.metric, 'metric')}: mean {self.similarity_mean:.4f}, median "
            f"{self.similarity_median:.4f}, 5 % of images below {self.similarity_p5:.4f}{guess}"
        ]

    def _ratio(self) -> list[str]:
        if self.speedup is None or self.speedup_quartiles is None:
            return []
        low, high = self.speedup_quartiles
        batches = f"{self.speedup_batches} paired batches, without the first"
        if self.speedup_batches == 1:
            batches = "one batch"
        return [
            f"speed    {self.speedup:.2f}x of dense, quartiles {low:.2f} to {high:.2f}, {batches}"
        ]

    def _reading(self) -> str:
        if self.preprocessing is None:
            return "batches, used unchanged"
        tensors = "tensors as the dataset gives them, else " * (self.images_from == "dataset")
        return f"{tensors}{self.preprocessing}"


def _accuracy(top1: float | None, top5: float | None) -> str:
    first = "" if top1 is None else f"top-1 {top1:6.2f} %, "
    return first if top5 is None else f"{first}top-5 {top5:6.2f} %, "


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    split: str = "validation",
    limit: int | None = None,
    workers: int = 0,
    image_size: int | tuple[int, int] | None = None,
    augment: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Measure accuracy, agreement and speed of a patched model against its own dense path.

    Classifiers give top-1, top-5 and agreement, headless models the cosine similarity of their
    features; ``metric`` sets a comparison without labels. Every batch runs through both paths, in
    alternating order. A row of logits with a NaN counts as wrong. An unpatched classifier gives
    only the dense figures. The model runs in eval mode, and its state is restored, also after an
    error. With torchrun or ``accelerate launch``, every process takes its share, every image counts
    once, and all processes get the same result.

    Args:
        model: A model that returns logits ``[B, classes]``, an object, dict or tuple that contains
            them (``logits`` of transformers' models), or features.
        data: The data, in any form that `sparsiattn.training.data.loader` takes, for example an
            iterable of batches (images ``[B, C, H, W]``, labels ``[B]`` int64). A comparison
            without labels needs only images.
        batch_size: Number of images in a batch.
        split: Name of the split.
        limit: Largest number of images; None for all.
        workers: Number of processes that read images.
        image_size: Image size in pixels; None for the size that the model was built for.
        augment: Options of preprocessing, e.g. ``{"mean": ..., "std": ...}``.
        metric: The comparison of dense and patched outputs per image, without labels.
            ``"features"`` is the cosine similarity over channels, averaged over all positions and
            maps; ``"classes"`` is whether the first choice is the same. A function gets the dense
            and the patched output and returns one number, or one for each image ``[B]``. If None,
            labels are used, or ``"features"`` if the model has no head.
        progress: Called with the number of images done and the total; None if it is unknown.
        device: The device to run on; the model is moved back afterwards. None for the model's own.

    Returns:
        The figures.

    Raises:
        DataError: Data cannot be read or has other classes than the head, or the model's outputs
            cannot be compared.
        InvalidOption: The data is already divided among processes, or a metric is requested for a
            model that is not patched.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, "topk", k=1.0):
    ...     result = evaluate(model, [(tiny_images(4), torch.tensor([0, 1, 2, 3]))])
    >>> result.images, result.agreement, result.top1 == result.dense_top1
    (4, 100.0, True)
    >>> with sparsiattn.patch(tiny_vit(num_classes=0), "topk", k=0.5) as patch:
    ...     result = evaluate(patch.model, [tiny_images(4)])
    >>> result.metric, 0.9 < result.similarity_p5 < result.similarity_mean < 1
    ('features', True)
    """
    # DistributedDataParallel would wait for other processes, which may have fewer batches
    parallel = nn.parallel.DistributedDataParallel
    host = model.module if isinstance(model, parallel) else model
    _refuse_prepared(data)
    sides = Sides(host, patch_of(host), metric)
    world = processes.world(device)
    with _ready(host, device or world.device) as (device, dtype):
        batches = loader(
            data,
            host,
            batch_size=batch_size,
            split=split,
            limit=limit,
            workers=workers,
            image_size=image_size,
            augment=augment,
            share=(world.rank, world.size),
            labels=sides.counts_labels,
        )
        # no inference mode, here and in analysis: transformers' BEiT keeps tables that it makes
        # while it runs, and one that was made in inference mode breaks all later training
        with torch.no_grad():
            for images, labels in _counted(batches, progress):
                sides.run(images.to(device, dtype), labels)
        tallies = world.gather(sides.tally)
    return replace(_summary(tallies, sides.patch is not None), **_reading(data, batches))


def _reading(data: Any, batches: Any) -> dict[str, Any]:
    """The fields of `Evaluation` about the source of images."""
    preprocessing = getattr(batches, "preprocessing", None)
    if preprocessing is None:
        return {"images_from": "batches"}
    return {
        "images_from": "files" if is_path(data) else "dataset",
        "preprocessing": preprocessing,
    }


def _counted(batches: Any, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches; labels of images that only pad the share are left out."""
    total, done = getattr(batches, "image_count", None), 0
    for images, labels in batches:
        if not isinstance(labels, Tensor) or labels.shape != (len(images),):
            raise DataError(
                f"labels must be class indices [{len(images)}], got "
                f"{tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__}"
            )
        counted = labels if total is None else labels[: max(0, total - done)]
        yield images, counted
        done += len(counted)
        if progress is not None:
            progress(done, total)


def _summary(tallies: list[Tally], patched: bool) -> Evaluation:
    """The figures over all processes."""
    counts: Counter[str] = sum((tally.counts for tally in tallies), Counter())
    has_top5 = max(tally.classes for tally in tallies) >= 5
    images = counts["images"]
    if not images:
        raise DataError("there are no images to evaluate: the data has no batches")
    by_labels = not any(tally.values for tally in tallies)

    def percent(name: str, measured: bool = True) -> float | None:
        return 100 * counts[name] / images if measured and by_labels else None

    def speed(side: str) -> float:
        return sum(tally.speed(side) for tally in tallies)

    evaluation = Evaluation(
        images=images,
        top1=percent("patched top1", patched),
        top5=percent("patched top5", patched and has_top5),
        dense_top1=percent("dense top1"),
        dense_top5=percent("dense top5", has_top5),
        agreement=percent("agreement", patched),
        images_per_second=speed("patched") if patched else None,
        dense_images_per_second=speed("dense"),
    )
    ratios = [ratio for tally in tallies for ratio in tally.ratios()]
    if ratios:
        low, middle, high = Quartiles.of(ratios)
        pairs: Any = {"speedup_quartiles": (low, high), "speedup_batches": len(ratios)}
        evaluation = replace(evaluation, speedup=middle, **pairs)
    return evaluation if by_labels else replace(evaluation, **_similarity(tallies))


def _similarity(tallies: list[Tally]) -> dict[str, Any]:
    """The fields of `Evaluation` about the metric."""
    values = np.array([value for tally in tallies for value in tally.values])
    measured = next(tally for tally in tallies if tally.values)
    mean = float(values.mean())
    return {
        "metric": measured.metric,
        "metric_guessed": measured.guessed,
        "agreement": 100 * mean if measured.metric == "classes" else None,
        "similarity_mean": mean,
        "similarity_median": float(np.median(values)),
        "similarity_p5": float(np.percentile(values, 5)),
    }


def _refuse_prepared(data: Any) -> None:
    sampler = getattr(data, "sampler", None)
    prepared = type(data).__module__.startswith("accelerate.")
    if prepared or isinstance(sampler, torch.utils.data.DistributedSampler):
        raise InvalidOption(
            "evaluate() divides the data among processes itself, but this loader does so too, and "
            "repeats images to make shares equal: pass the loader from before accelerate's "
            "prepare(), or the path of the data"
        )


@contextmanager
def _ready(model: nn.Module, device: Any) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Put the model in eval mode on a device inside the block; restore both afterwards.

    Yields:
        The device and the dtype that the images must have.
    """
    tensors = chain(model.parameters(), model.buffers())
    weight = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    home = weight.device
    target = torch.device(home if device is None else device)
    with eval_mode(model), ExitStack() as stack:
        if target != home:
            stack.callback(model.to, home)
            model.to(target)
        yield target, weight.dtype
