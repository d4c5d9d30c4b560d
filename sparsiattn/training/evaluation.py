"""`evaluate`: accuracy of a model, dense and patched, in one pass over the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.patching.model_call import eval_mode, logits_of
from sparsiattn.runtime.timing import timed
from sparsiattn.training import processes
from sparsiattn.training.data import loader
from sparsiattn.training.progress import Progress
from sparsiattn.training.samples import check_labels


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; what speaks of a patch is None where there is none.

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
    """

    images: int
    top1: float | None
    top5: float | None
    dense_top1: float
    dense_top5: float | None
    agreement: float | None
    images_per_second: float | None
    dense_images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        dense = _line(self.dense_top1, self.dense_top5, self.dense_images_per_second)
        lines = [f"{self.images} images", f"dense    {dense}"]
        if self.top1 is not None and self.images_per_second is not None:
            patched = _line(self.top1, self.top5, self.images_per_second)
            lines.append(f"patched  {patched}, {self.agreement:.2f} % agree with dense")
        return "\n".join(lines)


def _line(top1: float, top5: float | None, speed: float) -> str:
    second = "" if top5 is None else f", top-5 {top5:6.2f} %"
    return f"top-1 {top1:6.2f} %{second}, {speed:.1f} images/s"


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
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Top-1, top-5, agreement and speed of a patched model beside its own dense path.

    Every batch runs through both sides, which take turns in going first. A row of logits with a NaN
    counts as wrong. An unpatched model gives the dense figures alone. The model runs in eval mode,
    and is left as it was, also after an error. Launched by torchrun or ``accelerate launch``, every
    process takes its share, every image counts once, and all processes get the same result.

    Args:
        model: Returns logits ``[B, classes]`` or an object, dict or tuple that has them (``logits``
            of transformers' models).
        data: Whatever `sparsiattn.training.data.loader` takes, ready batches (images ``[B, C, H,
            W]``, labels ``[B]`` int64) among it. The next six arguments go there.
        batch_size: Images in a batch.
        split: The part of the data.
        limit: Number of images, all if None.
        workers: Processes that read images.
        image_size: Pixels, else what the model was built for.
        augment: How images are read, e.g. ``{"mean": ..., "std": ...}``.
        progress: Called with images done and their number, None if unknown.
        device: Where the model is for the time being.

    Raises:
        DataError: Data cannot be read or has other classes than the head.
        InvalidOption: The data is already shared out among processes.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, "topk", k=1.0):
    ...     result = evaluate(model, [(tiny_images(4), torch.tensor([0, 1, 2, 3]))])
    >>> result.images, result.agreement, result.top1 == result.dense_top1
    (4, 100.0, True)
    """
    # DistributedDataParallel would wait for other processes, whose shares may be shorter
    parallel = nn.parallel.DistributedDataParallel
    host = model.module if isinstance(model, parallel) else model
    _refuse_prepared(data)
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
        )
        patch, tally = patch_of(host), _Tally()
        with torch.inference_mode():
            for images, labels in _counted(batches, progress):
                tally.add(host, patch, images.to(device, dtype), labels)
        return _summary(world.gather(tally), patch is not None)


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


@dataclass
class _Tally:
    """Counts of one process.

    Attributes:
        counts: Images, and right answers by side and kind.
        classes: Of the head.
        times: Images and seconds of every batch, by side.
    """

    counts: Counter[str] = field(default_factory=Counter)
    classes: int = 0
    times: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, model: nn.Module, patch: Patch | None, images: Tensor, labels: Tensor) -> None:
        """Both sides of one batch; ``labels`` of its first images, which alone count."""
        sides = ["dense"] if patch is None else ["dense", "patched"]
        logits = {}
        for side in sides if len(self.times.get("dense", ())) % 2 == 0 else sides[::-1]:
            with patch.disabled() if patch is not None and side == "dense" else nullcontext():
                output, seconds = timed(lambda: model(images))
            logits[side] = logits_of(output, model)[: len(labels)]
            self.times.setdefault(side, []).append((len(images), seconds))
        if len(labels):
            self._count(logits, labels)

    def speed(self, side: str) -> float:
        """Median images a second of whole batches, without the first, which warms up, if it can be
        spared; 0 if there was none."""
        times = self.times.get(side, [])
        speeds = [images / seconds for images, seconds in times if images == max(times)[0]]
        return median(speeds[1:] if len(speeds) > 2 else speeds or [0.0])

    def _count(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        if labels.is_floating_point():
            raise DataError(f"labels must be class indices (int64), got {labels.dtype}")
        self.classes = logits["dense"].shape[1]
        check_labels(labels, self.classes)
        self.counts["images"] += len(labels)
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


def _summary(tallies: list[_Tally], patched: bool) -> Evaluation:
    """Figures over all processes; the same in each."""
    counts: Counter[str] = sum((tally.counts for tally in tallies), Counter())
    has_top5 = max(tally.classes for tally in tallies) >= 5
    images = counts["images"]
    if not images:
        raise DataError("no images to evaluate: the data gave not one batch")

    def percent(name: str) -> float:
        return 100 * counts[name] / images

    def speed(side: str) -> float:
        return sum(tally.speed(side) for tally in tallies)

    return Evaluation(
        images=images,
        top1=percent("patched top1") if patched else None,
        top5=percent("patched top5") if patched and has_top5 else None,
        dense_top1=percent("dense top1"),
        dense_top5=percent("dense top5") if has_top5 else None,
        agreement=percent("agreement") if patched else None,
        images_per_second=speed("patched") if patched else None,
        dense_images_per_second=speed("dense"),
    )


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
