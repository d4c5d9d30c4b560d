"""`evaluate`: accuracy of a model, dense and patched, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.runtime.timing import timed

if TYPE_CHECKING:
    from sparsiattn.training.processes import World

Progress = Callable[[int, int | None], Any]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    top1, top5, dense_top1, dense_top5: accuracies in per cent; top 5 is None below five classes.
    agreement: images for which the patched model's first choice is the dense one's, in per cent.
    images_per_second, dense_images_per_second: of the model alone (no reading of images), the
    median over batches, summed over processes. What speaks of a patch is None where there is none.
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
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.images} images"]
        dense = _line(self.dense_top1, self.dense_top5, self.dense_images_per_second)
        lines.append(f"dense    {dense}")
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

    data: whatever `sparsiattn.training.data.loader` takes, ready batches (images ``[B, C, H, W]``,
    labels ``[B]`` int64) among it; batch_size, split, limit, workers, image_size and augment (``{
    "mean": ..., "std": ...}``) go there. Every batch runs through both sides, which take turns in
    going first. progress: called with images done and their number, None if unknown. device: where
    the model is for the time being.

    A row of logits with a NaN counts as wrong. An unpatched model gives the dense figures alone.
    The model may return logits ``[B, classes]`` or an object, dict or tuple that has them
    (``logits`` of transformers' models). It runs in eval mode, and is left as it was, also after an
    error.

    Launched by torchrun or ``accelerate launch``, every process takes its share, every image
    counts once, and all processes get the same result. Raises `DataError` for data that cannot be
    read or has other classes than the head.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, "topk", k=1.0):
    ...     found = evaluate(model, [(tiny_images(4), torch.tensor([0, 1, 2, 3]))])
    >>> found.images, found.agreement, found.top1 == found.dense_top1
    (4, 100.0, True)
    """
    from sparsiattn.training.data import loader
    from sparsiattn.training.processes import world

    host = _without_ddp(model)
    _refuse_prepared(data)
    here = world(device)
    with _evaluating(host, device or here.device) as like:
        share = here.rank, here.size
        batches = loader(
            data, host, batch_size=batch_size, split=split, limit=limit, workers=workers,
            image_size=image_size, augment=augment, share=share,
        )  # fmt: skip
        tally = _Tally()
        with torch.inference_mode():
            for images, labels in _own(batches, progress):
                tally.add(host, patch_of(host), images.to(like.device, like.dtype), labels)
        return tally.result(here, patch_of(host) is not None)


def _own(batches: Any, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as they come; labels cut to those images that do not merely fill up the share."""
    own, done = getattr(batches, "own", None), 0
    for images, labels in batches:
        if not isinstance(labels, Tensor) or labels.shape != (len(images),):
            raise DataError(
                f"labels must be class indices [{len(images)}], got "
                f"{tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__}"
            )
        counted = labels if own is None else labels[: max(0, own - done)]
        yield images, counted
        done += len(counted)
        if progress is not None:
            progress(done, own)


@dataclass
class _Tally:
    """Counts of one process."""

    images: int = 0
    classes: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, model: nn.Module, live: Patch | None, images: Tensor, labels: Tensor) -> None:
        """Both sides of one batch; ``labels`` of its first images, which alone count."""
        sides = ["dense"] if live is None else ["dense", "patched"]
        found = {}
        for side in sides if len(self.times.get("dense", ())) % 2 == 0 else sides[::-1]:
            off = live.disabled() if live is not None and side == "dense" else nullcontext()
            with off:
                found[side], seconds = _timed(model, images)
            self.times.setdefault(side, []).append((len(images), seconds))
        self._count({side: logits[: len(labels)] for side, logits in found.items()}, labels)

    def speed(self, side: str) -> float:
        """Median images a second of whole batches, without the first, which warms up, if it can be
        spared; 0 if there was none."""
        times = self.times.get(side, [])
        whole = [images / seconds for images, seconds in times if images == max(times)[0]]
        return median(whole[1:] if len(whole) > 2 else whole or [0.0])

    def _count(self, found: dict[str, Tensor], labels: Tensor) -> None:
        dense = found["dense"]
        if not len(labels):
            return
        _check_labels(labels, dense.shape[1])
        self.images, self.classes = self.images + len(labels), dense.shape[1]
        first: dict[str, Tensor] = {}
        for side, logits in found.items():
            best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
            best = best.masked_fill(logits.isnan().any(1, keepdim=True), -1)
            right = best == labels.to(best.device)[:, None]
            first[side] = best[:, 0]
            self._add(f"{side} top1", right[:, 0])
            self._add(f"{side} top5", right.any(1))
        if "patched" in first:
            self._add("agreement", (first["patched"] == first["dense"]) & (first["dense"] >= 0))

    def _add(self, name: str, hits: Tensor) -> None:
        self.hits[name] = self.hits.get(name, 0) + int(hits.sum())

    def result(self, here: World, patched: bool) -> Evaluation:
        """Summed over all processes; the same in each."""
        names = ["dense top1", "dense top5", "patched top1", "patched top5", "agreement"]
        speeds = [self.speed("dense"), self.speed("patched")]
        own = [self.hits.get(name, 0) for name in names]
        images, dense_speed, speed, *counts = here.sums([self.images, *speeds, *own])
        (classes,) = here.largest([self.classes])
        if not images:
            raise DataError("no images to evaluate: the data gave not one batch")
        share = {name: 100 * count / images for name, count in zip(names, counts, strict=True)}
        five = classes >= 5
        return Evaluation(
            images=int(images),
            top1=share["patched top1"] if patched else None,
            top5=share["patched top5"] if patched and five else None,
            dense_top1=share["dense top1"],
            dense_top5=share["dense top5"] if five else None,
            agreement=share["agreement"] if patched else None,
            images_per_second=speed if patched else None,
            dense_images_per_second=dense_speed,
        )


def _timed(model: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """Logits ``[B, classes]`` and the seconds they took."""
    output, seconds = timed(lambda: model(images))
    return logits_of(output, model), seconds


def logits_of(out: Any, model: nn.Module) -> Tensor:
    """Logits ``[B, classes]`` in whatever a classifier returns."""
    if isinstance(out, Mapping) and "logits" in out:
        out = out["logits"]
    out = getattr(out, "logits", out)
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise DataError(
            f"this needs a classifier: logits [B, classes], but {type(model).__name__} gave {got}"
        )
    return out


def _check_labels(labels: Tensor, classes: int) -> None:
    from sparsiattn.training.samples import check_label

    if labels.is_floating_point():
        raise DataError(f"labels must be class indices (int64), got {labels.dtype}")
    check_label(int(labels.min()), int(labels.max()), classes, "a batch")


def _without_ddp(model: nn.Module) -> nn.Module:
    """Not in step with other processes, whose shares may be of other lengths."""
    parallel = nn.parallel.DistributedDataParallel
    return model.module if isinstance(model, parallel) else model


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
def _evaluating(model: nn.Module, device: Any) -> Iterator[Tensor]:
    """Eval mode on that device inside the block; gives a tensor of the weights' device and type."""
    modes = [(module, module.training) for module in model.modules()]
    before = _some_weight(model.parameters(), model.buffers())
    moves = device is not None and torch.device(device) != before.device
    model.eval()
    try:
        if moves:
            model.to(device)
        yield _some_weight(model.parameters(), model.buffers()) if moves else before
    finally:
        if moves:
            model.to(before.device)
        for module, training in modes:
            module.training = training


def _some_weight(*tensors: Iterable[Tensor]) -> Tensor:
    """The first floating one."""
    found = (t for group in tensors for t in group if t.is_floating_point())
    return next(found, torch.empty(0))
