"""Batches of images and labels for a model: from folders, tars, timm's readers and datasets."""

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
"""Rank of a process, and number of processes."""

_LABELLED = "(images [B, C, H, W], labels [B], ...)"
_UNLABELLED = "images [B, C, H, W], or a tuple that begins with them"


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

    Statistics and sizes come from the model's data config (see `data_config`); transformers and
    torchvision models name none and get ImageNet's: pass ``mean`` and ``std`` where others hold.

    Args:
        source: A folder or ``.tar`` with one folder of images a class, below ``train/``,
            ``validation/`` and so on or not; ``READER/NAME`` or ``READER/NAME@FOLDER`` for timm's
            readers (``hfds/cifar10``, ``wds/FOLDER``, ``torch/cifar10@FOLDER``); a
            `torch.utils.data.Dataset` of (PIL image, uint8 tensor or finished float tensor ``[C, H,
            W]``, label); or an iterable of ready batches, used as they are.
        model: Takes the images.
        batch_size: Images in a batch.
        split: The part of the source.
        training: Shuffled, augmented, the last partial batch left out.
        seed: Order and augmentation of an epoch depend on it, on ``set_epoch`` and on the image
            alone, so on neither workers nor processes nor what ran before.
        workers: Processes that read images.
        limit: So many images, spread evenly over the split (of streams and batches: the first).
        image_size: Pixels, else what the model was built for.
        augment: Options of timm's `create_transform` and `Mixup` by their names (``mean``, ``std``,
            ``crop_pct``, ``auto_augment``, ``re_prob``, ``mixup_alpha`` ...); outside training only
            those that say how an image is read count. With mixup or cutmix labels are ``[B,
            classes]`` float32.
        share: ``(rank, world)``, every world-th image from rank on. Shares of unequal length are
            filled up with the first image, `Loader.image_count` says how many count.
        labels: False where they do not matter: none is looked at or needed, all are 0; ready
            batches may be images alone.

    Raises:
        DataError: Data is missing, empty, broken or of other classes than the head's.
        UnknownName: An option of ``augment`` is unknown.
        InvalidOption: A value is wrong.

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
        raise InvalidOption(f"mixup and cutmix pair images: batch_size must be even, {batch_size=}")
    transform = image_transform(config, training, options)
    finish = Finish(transform, channels, classes, seed, training, labels)
    collate = partial(_collate, mix=mix, seed=seed)
    reading = {"batch_size": batch_size, "num_workers": workers, "collate_fn": collate}
    return Loader(images, finish, limit, share, Preprocessing.of(config), **reading)


class Order(Sampler[tuple[int, int]]):
    """``(epoch, index)`` of every image of a share; the epoch goes along so that worker processes
    know it."""

    def __init__(self, indices: tuple[int, ...], seed: int, shuffle: bool, share: Share) -> None:
        self.indices, self.seed, self.shuffle, self.share = indices, seed, shuffle, share
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which order comes next."""
        self.epoch = epoch

    @property
    def image_count(self) -> int:
        """Images of the share, without those that fill it up."""
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
    """A `torch.utils.data.DataLoader` whose epochs depend on (seed, epoch) alone.

    It has `set_epoch`, as distributed samplers have, and can be given to ``accelerate``'s
    ``prepare``.

    Attributes:
        preprocessing: How images that are no finished tensors are read, augmentation left out.
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
        self.limit: int | None = None  # of a stream, in images of this share
        self.order: Order | None = None
        # else every epoch draws a seed for the workers from the global one
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
                f"{len(indices)} images are fewer than batch_size={options['batch_size']}, and "
                "training leaves the last partial batch out: not one step would be made"
            )
        self.order = Order(indices, finish.seed, finish.training, share)
        super().__init__(Samples(source, finish), sampler=self.order, **options)

    @property
    def image_count(self) -> int | None:
        """Images of this share, without those that fill it up; None for streams."""
        return None if self.order is None else self.order.image_count

    def set_epoch(self, epoch: int) -> None:
        """Which order and augmentation come next."""
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
            # its frames would keep the worker processes waiting until they are collected
            cause = error.with_traceback(None) if self.num_workers else error
            raise DataError(_without_traceback(str(error))) from cause


class Batches:
    """Ready batches, cut off after so many images; of several processes each takes its own."""

    def __init__(
        self, source: Iterable[Any], limit: int | None, share: Share, labels: bool = True
    ) -> None:
        if not isinstance(source, Iterable):
            raise DataError(
                "data must be a path, a timm reader's name, a Dataset or an iterable of batches "
                f"(images, labels), got {type(source).__name__}"
            )
        self.source, self.limit, self.share, self.labels = source, limit, share, labels

    def set_epoch(self, epoch: int) -> None:
        """Passed on, where the source knows epochs."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __len__(self) -> int:
        if self.limit is not None:
            raise TypeError("how many batches make up the limit is not known beforehand")
        return len(range(self.share[0], len(self.source), self.share[1]))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        rank, world = self.share
        return islice(_limited(self.source, self.limit, self.labels), rank, None, world)


def _collate(samples: list[Sample], mix: Any, seed: int) -> Any:
    """A batch of samples, mixed up if the recipe has mixup or cutmix."""
    images, labels = default_collate([sample[:2] for sample in samples])
    if mix is None:
        return images, labels
    with seeded(seed, len(samples), *samples[0][2]):
        return mix(images, labels)


def spread(indices: tuple[int, ...], limit: int | None) -> tuple[int, ...]:
    """So many of the indices, evenly spaced: a split sorted by class keeps all its classes.

    >>> spread((0, 1, 2, 3, 4, 5), 3)
    (0, 2, 4)
    """
    count = len(indices)
    if limit is None or limit >= count:
        return indices
    return tuple(indices[i * count // limit] for i in range(limit))


def _limited(batches: Iterable[Any], limit: int | None, labels: bool) -> Iterator[Any]:
    """Batches up to so many images, the last one cut; labels are zeros where they do not matter."""
    for batch in batches:
        match batch:
            case (Tensor(ndim=4) as images, given, *_) if labels:
                pass
            case (Tensor(ndim=4) as images) | (Tensor(ndim=4) as images, *_) if not labels:
                given = images.new_zeros(len(images), dtype=torch.int64)
            case _:
                raise DataError(
                    f"every batch must be {_LABELLED if labels else _UNLABELLED}, got "
                    f"{_described(batch)}"
                )
        if limit is not None:
            images, given = images[:limit], given[:limit]
            limit -= len(images)
        yield images, given
        if limit == 0:
            return


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(_described(part) for part in batch)})"
    return type(batch).__name__


def _without_traceback(text: str) -> str:
    """Of an error that a worker process raised: torch wraps it in that process's traceback."""
    return text.rstrip().rsplit("DataError: ", 1)[-1] if text.startswith("Caught ") else text


def _check_classes(images: Source, source: Any, classes: int | None) -> None:
    if not images.streams and not images.indices:
        raise DataError(f"{source!r} has no images")
    if None not in (classes, images.classes) and classes != images.classes:
        where = repr(str(source)) if is_path(source) else type(source).__name__
        raise DataError(
            f"{where} has {images.classes} classes, the model's head {classes}: make a model with "
            f"such a head, timm.create_model(..., num_classes={images.classes}) (on the command "
            f"line --model-option num_classes={images.classes}), or give the data it was made for"
        )
