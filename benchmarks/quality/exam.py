"""What a model is asked, to be compared with what the dense one says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from quality import speed
from quality.metrics import Features, compare, named
from quality.models import Subject
from quality.rows import Row
from quality.sources import Sources
from quality.variants import Line, Variant, variant


@dataclass(frozen=True)
class Exam:
    """Photos, and labelled images where the model can name what it sees.

    Attributes:
        model: A timm ViT, dense.
        images: Photos as it takes them.
        batch: Images at once.
        text: Vectors of names; None without.
        decoder: Of saliency; None without.
        labelled: Images, classes and vectors of the classes' names; None without.
    """

    model: Any
    images: Tensor
    batch: int
    text: Tensor | None
    decoder: Any
    labelled: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, subject: Subject, sources: Sources, photos: int, labelled: int) -> Exam:
        """With so many photos and labelled images."""
        model, text, batch = subject.model(sources), subject.text(sources), max(subject.batches)
        known = None if text is None or not labelled else subject.labelled(sources, labelled)
        images, decoder = subject.images(sources, photos), subject.decoder(sources)
        return cls(model, images, batch, text, decoder, known)

    def features(self, made: Variant) -> Features:
        """What a variant of the model says of the photos."""
        said = {"text": self.text, "decoder": self.decoder}
        return Features.of(made, self.images, batch=self.batch, **said)

    def judge(self, dense: Features, line: Line) -> Row:
        """What is left of the dense model's features and answers, as JSON."""
        with variant(self.model, line) as made:
            row = compare(dense, self.features(made)) | speed.settings(made.patch)
            if self.labelled is None:
                return row
            return row | {"top1": self.top1(made), "top1_dense": self.dense_top1}

    @cached_property
    def dense_top1(self) -> float:
        """`top1` of the dense model."""
        with variant(self.model, {}) as made:
            return self.top1(made)

    def top1(self, made: Variant) -> float:
        """The share of labelled images that are named rightly."""
        assert self.labelled is not None
        images, classes, text = self.labelled
        right = named(made, images, text, self.batch) == classes
        return round(right.double().mean().item(), 4)
