"""Batches of images and labels for a model, from folders, tars, timm's readers and datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.training.field_kinds import check_counts
from sparsiattn.training.preprocess import (
    Preprocessing,
    check_options,
    data_config,
    head_size,
    image_transform,
    mixing,
    seeded,
)
from sparsiattn.training.samples import Finish, Sample, Samples, SampleStream
from sparsiattn.training.sources import Source, is_path, open_source

Share = tuple[int, int]
"""Rank of a process, and the number of processes."""

_LABELLED = "(images [B, C, H, W], labels [B], ...)"
_UNLABELLED = "images [B, C, H, W], or a tuple that starts with them"


def loader(
    source: Any,
    model: nn.Module,
    *,
    batch_size: int = 64,
    split: str = "validation",
    training: bool = False,
    seed: int = 0,
    workers: int = 0,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    augment: Mapping[str, Any] | None = None,
    share: Share = (0, 1),
    labels: bool = True,
) -> Loader | Batches:
    """Batches ``(images [B, C, H, W] normalised float32, labels [B] int64)`` for a model.

    Statistics and sizes come from the model's data config (see `data_config`). Models of
    transformers and torchvision have none and get ImageNet's statistics: pass ``mean`` and ``std``
    if others apply.

    Args:
        source: One of: a folder or ``.tar`` with one folder of images per class, optionally below
            ``train/``, ``validation/`` and so on; ``READER/NAME`` or ``READER/NAME@FOLDER`` for
            timm's readers (``hfds/cifar10``, ``wds/FOLDER``, ``torch/cifar10@FOLDER``); a
            `torch.utils.data.Dataset` of ``(image, label)``, where the image is a PIL image, a
            uint8 tensor or a preprocessed float tensor ``[C, H, W]``; an iterable of batches, which
            are used unchanged.
        model: The model that will get the images.
        batch_size: Number of images in a batch.
        split: Name of the split.
        training: Whether to shuffle, augment, and drop the last partial batch.
        seed: Seed of order and augmentation. Both depend only on the seed, ``set_epoch`` and the
            image, not on the number of workers or processes.
        workers: Number of processes that read images.
        limit: Largest number of images, spread evenly over the split (for streams and batches, the
            first ones); None for all.
        image_size: Image size in pixels; None for the size that the model was built for.
        augment: Options of timm's `create_transform` and `Mixup` by their names (``mean``, ``std``,
            ``crop_pct``, ``auto_augment``, ``re_prob``, ``mixup_alpha`` ...). Without ``training``
            only the options of preprocessing have an effect. With mixup or cutmix, labels are
            ``[B, classes]`` float32.
        share: ``(rank, world)`` for data parallel processes: every ``world``-th image from ``rank``
            on. Shorter shares are padded with the first image; `Loader.image_count` excludes it.
        labels: Whether to read labels. If False, all labels are 0, and batches may contain only
            images.

    Returns:
        A `Loader`; for an iterable of batches, a `Batches`.

    Raises:
        DataError: Data is missing, empty or broken, or its classes do not fit the model's head.
        UnknownName: An option of ``augment`` is unknown.
        InvalidOption: A value is out of range.

    >>> from torch.utils.data import TensorDataset
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> data = TensorDataset(tiny_images(3), torch.tensor([0, 4, 2]))
    >>> [(tuple(x.shape), y.tolist()) for x, y in loader(data, tiny_vit(), batch_size=2)]
    [((2, 3, 32, 32), [0, 4]), ((1, 3, 32, 32), [2])]
    """
    options = dict(augment or {})
    check_options(options)
    check_counts(1, batch_size=batch_size, limit=limit)
    check_counts(0, seed=seed, workers=workers)
    if not 0 <= share[0] < share[1]:
        raise InvalidOption(f"share must be (rank, world) with 0 <= rank < world, got {share!r}")
    classes = head_size(model) if labels else None
    if not is_path(source) and not isinstance(source, Dataset):
        return Batches(source, limit, share, labels)
    config = data_config(model, image_size, options)
    channels = config["input_size"][0]
    images = open_source(source, split, channels, training, seed)
    _check_classes(images, source, classes)
    mix = mixing(options, classes) if training else None
    if mix is not None and batch_size % 2:
        raise InvalidOption(
            f"mixup and cutmix pair images: batch_size must be even, got {batch_size}"
        )
    transform = image_transform(config, training, options)
    finish = Finish(transform, channels, classes, seed, training, labels)
    collate = partial(_collate, mix=mix, seed=seed)
    reading = {"batch_size": batch_size, "num_workers": workers, "collate_fn": collate}
    return Loader(images, finish, limit, share, Preprocessing.of(config), **reading)


class Order(Sampler[tuple[int, int]]):
    """``(epoch, index)`` of every image of a share.

    The epoch is included so that worker processes know it.
    """

    def __init__(self, indices: tuple[int, ...], seed: int, shuffle: bool, share: Share) -> None:
        self.indices, self.seed, self.shuffle, self.share = indices, seed, shuffle, share
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    @property
    def image_count(self) -> int:
        """Number of images in the share, without padding."""
        return len(range(self.share[0], len(self.indices), self.share[1]))

    def __len__(self) -> int:
        return -(-len(self.indices) // self.share[1])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(self.indices)
        if self.shuffle:
            with seeded(self.seed, self.epoch):
                order = [order[i] for i in torch.randperm(len(order)).tolist()]
        rank, world = self.share
        indices = order[rank::world]
        indices += order[: len(self) - len(indices)]
        return iter([(self.epoch, index) for index in indices])


class Loader(DataLoader[Any]):
    """A `torch.utils.data.DataLoader` whose epochs depend only on (seed, epoch).

    It has `set_epoch` as distributed samplers have, and can be passed to ``accelerate``'s
    ``prepare``.

    Attributes:
        preprocessing: The preprocessing of images without augmentation; tensors of a dataset that
            are already preprocessed are used unchanged.
    """

    def __init__(
        self,
        source: Source,
        finish: Finish,
        limit: int | None,
        share: Share,
        preprocessing: Preprocessing,
        **options: Any,
    ) -> None:
        self.preprocessing = preprocessing
        self.limit: int | None = None  # number of images of this share, for a stream
        self.order: Order | None = None
        # otherwise every epoch draws a seed for the workers from the global generator
        options["generator"] = torch.Generator().manual_seed(finish.seed)
        options["drop_last"] = finish.training
        if source.streams:
            self.limit = None if limit is None else len(range(share[0], limit, share[1]))
            stream = SampleStream(source.items, finish, share, options["num_workers"])
            super().__init__(stream, **options)
            return
        indices = spread(source.indices, limit)
        if finish.training and len(indices) < options["batch_size"]:
            raise DataError(
                f"training drops the last partial batch, and {len(indices)} images do not fill one "
                f"batch of batch_size={options['batch_size']}: lower batch_size or pass more images"
            )
        self.order = Order(indices, finish.seed, finish.training, share)
        super().__init__(Samples(source, finish), sampler=self.order, **options)

    @property
    def image_count(self) -> int | None:
        """Number of images in this share, without padding; None for streams."""
        return None if self.order is None else self.order.image_count

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines order and augmentation."""
        (self.dataset if self.order is None else self.order).set_epoch(epoch)  # type: ignore[union-attr]

    def __len__(self) -> int:
        count = super().__len__()
        if self.limit is None or self.batch_size is None:
            return count
        return min(count, -(-self.limit // self.batch_size))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        try:
            yield from _limited(batches, self.limit, labels=True)
        except DataError as error:
            # its traceback would keep the worker processes alive until it is garbage-collected
            cause = error.with_traceback(None) if self.num_workers else error
            raise DataError(_without_traceback(str(error))) from cause


class Batches:
    """Batches of the user, up to a number of images; every process takes its own batches.

    Args:
        source: The batches.
        limit: Largest number of images; None for all.
        share: Rank and number of processes.
        labels: Whether to read labels; if False, all labels are 0.

    >>> batches = Batches([(torch.zeros(4, 3, 8, 8), torch.arange(4))], limit=2, share=(0, 1))
    >>> [labels.tolist() for _, labels in batches]
    [[0, 1]]
    """

    def __init__(
        self, source: Iterable[Any], limit: int | None, share: Share, labels: bool = True
    ) -> None:
        if not isinstance(source, Iterable):
            raise DataError(
                "data must be a path, the name of a timm reader, a Dataset or an iterable of "
                f"batches (images, labels), got {type(source).__name__}"
            )
        self.source, self.limit, self.share, self.labels = source, limit, share, labels

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the source, if it has ``set_epoch``."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __len__(self) -> int:
        if self.limit is not None:
            raise TypeError("the number of batches is not known in advance if limit is set")
        return len(range(self.share[0], len(self.source), self.share[1]))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        rank, world = self.share
        return islice(_limited(self.source, self.limit, self.labels), rank, None, world)


def _collate(samples: list[Sample], mix: Any, seed: int) -> Any:
    """A batch of samples, after mixup or cutmix if ``mix`` is set."""
    images, labels = default_collate([sample[:2] for sample in samples])
    if mix is None:
        return images, labels
    with seeded(seed, len(samples), *samples[0][2]):
        return mix(images, labels)


def spread(indices: tuple[int, ...], limit: int | None) -> tuple[int, ...]:
    """At most ``limit`` indices, evenly spaced, so that a split sorted by class keeps all classes.

    >>> spread((0, 1, 2, 3, 4, 5), 3)
    (0, 2, 4)
    """
    count = len(indices)
    if limit is None or limit >= count:
        return indices
    return tuple(indices[i * count // limit] for i in range(limit))


def _limited(batches: Iterable[Any], limit: int | None, labels: bool) -> Iterator[Any]:
    """Yield batches up to ``limit`` images, the last one cut; labels are 0 if they are not read."""
    for batch in batches:
        match batch:
            case (Tensor(ndim=4) as images, targets, *_) if labels:
                pass
            case (Tensor(ndim=4) as images) | (Tensor(ndim=4) as images, *_) if not labels:
                targets = images.new_zeros(len(images), dtype=torch.int64)
            case _:
                raise DataError(
                    f"every batch must be {_LABELLED if labels else _UNLABELLED}, got "
                    f"{_described(batch)}"
                )
        if limit is not None:
            images, targets = images[:limit], targets[:limit]
            limit -= len(images)
        yield images, targets
        if limit == 0:
            return


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(_described(part) for part in batch)})"
    return type(batch).__name__


def _without_traceback(text: str) -> str:
    """The message of an error of a worker process, which torch wraps in that traceback."""
    return text.rstrip().rsplit("DataError: ", 1)[-1] if text.startswith("Caught ") else text


def _check_classes(images: Source, source: Any, classes: int | None) -> None:
    if not images.streams and not images.indices:
        raise DataError(f"{source!r} has no images")
    if None not in (classes, images.classes) and classes != images.classes:
        where = repr(str(source)) if is_path(source) else type(source).__name__
        raise DataError(
            f"{where} has {images.classes} classes, the model's head {classes}: create a model "
            f"with a matching head, timm.create_model(..., num_classes={images.classes}) (on the "
            f"command line --model-option num_classes={images.classes}), or pass the data it was "
            "made for"
        )
