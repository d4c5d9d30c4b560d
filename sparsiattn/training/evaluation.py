"""`evaluate`: accuracy of a model, dense and patched, in one pass over the data."""

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
    """What `evaluate` found; None stands for what was not measured, or needs a patch.

    Attributes:
        images: Number of images.
        top1: Accuracy of the patched model, in per cent.
        top5: Likewise among its five first choices; None below five classes.
        dense_top1: Accuracy of the dense model, in per cent.
        dense_top5: Likewise among its five first choices; None below five classes.
        agreement: Images for which the patched model's first choice is the dense one's, in per
            cent.
        images_per_second: Of the patched model alone (no reading of images), the median over
            batches, summed over processes.
        dense_images_per_second: Likewise of the dense model.
        metric: What was measured: ``"labels"`` (accuracy), ``"classes"``, ``"features"`` or
            ``"callable"``, see `evaluate`.
        metric_guessed: Whether the model decided that, not the caller.
        similarity_mean: Of the metric, the mean over images; 1 is all for the built-in ones.
        similarity_median: Likewise the median.
        similarity_p5: Likewise the 5th percentile: 5 % of the images are below.
        speedup: Time of the dense model over that of the patched one, the median over batches that
            ran through both in turn; 2.0 is twice as fast.
        speedup_quartiles: First and third quartile of the same.
        speedup_batches: How many batches that is of: whole ones, the first left out.
        images_from: ``"files"``, ``"dataset"`` or ``"batches"``, which are used as they are.
        preprocessing: How files were read, and items of a dataset that are no finished tensors.
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

    def _speed(self, *, dense: bool) -> str:
        return f"{self.dense_images_per_second if dense else self.images_per_second:.1f} images/s"

    def _similarity(self) -> list[str]:
        if self.similarity_mean is None:
            return []
        name = {"features": "cosine of features", "classes": "first choices kept"}
        guess = ", chosen by the model: metric= names another" if self.metric_guessed else ""
        return [
            f"kept     {name.get(self.metric, 'metric')}: mean {self.similarity_mean:.4f}, median "
            f"{self.similarity_median:.4f}, 5 % of images below {self.similarity_p5:.4f}{guess}"
        ]

    def _ratio(self) -> list[str]:
        if self.speedup is None or self.speedup_quartiles is None:
            return []
        low, high = self.speedup_quartiles
        batches = f"{self.speedup_batches} batches run in pairs, without the first"
        if self.speedup_batches == 1:
            batches = "one batch"
        return [
            f"speed    {self.speedup:.2f}x of dense, quartiles {low:.2f} to {high:.2f}, {batches}"
        ]

    def _reading(self) -> str:
        if self.preprocessing is None:
            return "ready batches, used as they came"
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
    """Accuracy, agreement, features and speed of a patched model beside its own dense path.

    Classifiers give top-1, top-5 and agreement, headless models the cosine of their features;
    ``metric`` names what to compare without labels. Every batch runs through both sides, which take
    turns in going first. A row of logits with a NaN counts as wrong. An unpatched classifier gives
    the dense figures alone. The model runs in eval mode,
    and is left as it was, also after an error. Launched by torchrun or ``accelerate launch``, every
    process takes its share, every image counts once, and all processes get the same result.

    Args:
        model: Returns logits ``[B, classes]``, or an object, dict or tuple that has them
            (``logits`` of transformers' models), or features.
        data: Whatever `sparsiattn.training.data.loader` takes, ready batches (images ``[B, C, H,
            W]``, labels ``[B]`` int64) among it. Without labels images are enough. The next six
            arguments go there.
        batch_size: Images in a batch.
        split: The part of the data.
        limit: Number of images, all if None.
        workers: Processes that read images.
        image_size: Pixels, else what the model was built for.
        augment: How images are read, e.g. ``{"mean": ..., "std": ...}``.
        metric: What is compared between dense and patched, by image; labels are not looked at.
            ``"features"``: the cosine of the channels, mean over all positions and maps;
            ``"classes"``: whether the first choice is the same; or a function of the dense and the
            patched output, which gives a number or one for each image ``[B]``. If None, labels
            are counted, or, where the model says or shows that it has no head, features compared.
        progress: Called with images done and their number, None if unknown.
        device: Where the model is for the time being.

    Raises:
        DataError: Data cannot be read, has other classes than the head, or the model's outputs
            cannot be compared.
        InvalidOption: The data is already shared out among processes, or two outputs are to be
            compared of a model that is not patched.

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
    # DistributedDataParallel would wait for other processes, whose shares may be shorter
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
        with torch.inference_mode():
            for images, labels in _counted(batches, progress):
                sides.run(images.to(device, dtype), labels)
        tallies = world.gather(sides.tally)
    return replace(_summary(tallies, sides.patch is not None), **_reading(data, batches))


def _reading(data: Any, batches: Any) -> dict[str, Any]:
    """Where images came from, as `Evaluation` has it."""
    preprocessing = getattr(batches, "preprocessing", None)
    if preprocessing is None:
        return {"images_from": "batches"}
    return {
        "images_from": "files" if is_path(data) else "dataset",
        "preprocessing": preprocessing,
    }


def _counted(batches: Any, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as they come; labels cut to those images that do not merely fill up the share."""
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
    """Figures over all processes; the same in each."""
    counts: Counter[str] = sum((tally.counts for tally in tallies), Counter())
    has_top5 = max(tally.classes for tally in tallies) >= 5
    images = counts["images"]
    if not images:
        raise DataError("no images to evaluate: the data gave not one batch")
    by_labels = not any(tally.values for tally in tallies)

    def percent(name: str, measured: bool = True) -> float | None:
        return 100 * counts[name] / images if measured and by_labels else None

    def speed(side: str) -> float:
        return sum(tally.speed(side) for tally in tallies)

    found = Evaluation(
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
        found = replace(found, speedup=middle, **pairs)
    return found if by_labels else replace(found, **_similarity(tallies))


def _similarity(tallies: list[Tally]) -> dict[str, Any]:
    """What the metric gave, as `Evaluation` has it."""
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
            "evaluate() shares out the data among processes by itself, and this loader does so "
            "too, with images repeated to even it out: pass the loader as it was before, or the "
            "data's path"
        )


@contextmanager
def _ready(model: nn.Module, device: Any) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Eval mode on that device inside the block; gives what the images must have."""
    tensors = chain(model.parameters(), model.buffers())
    weight = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    home = weight.device
    target = torch.device(home if device is None else device)
    with eval_mode(model), ExitStack() as stack:
        if target != home:
            stack.callback(model.to, home)
            model.to(target)
        yield target, weight.dtype
