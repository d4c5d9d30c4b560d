"""What is left of a model's final features and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Features:
    """What a model says of some photos.

    Attributes:
        tokens: After the last norm, ``[photos, prefix + N, C]``, the class token first.
        prefix: How many of them are no patches.
        answers: Index of the name that fits best, ``[photos]``; None without text vectors.
    """

    tokens: Tensor
    prefix: int
    answers: Tensor | None = None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, images: Tensor, text: Tensor | None, batch: int) -> Features:
        """Of a timm ViT. ``forward_features`` gives every patch, also where tokens were dropped."""
        tokens = torch.cat([model.forward_features(part) for part in images.split(batch)])
        answers = None if text is None else (model.forward_head(tokens) @ text.T).argmax(-1)
        return cls(tokens, model.num_prefix_tokens, answers)


def compare(dense: Features, patched: Features) -> dict[str, Any]:
    """Cosines to the dense model's features, and the share of answers that stay, as JSON."""
    before, after = (x.tokens[:, dense.prefix :] for x in (dense, patched))
    mean = before.mean((0, 1))
    cosines = F.cosine_similarity(after, before, dim=-1)
    row: dict[str, Any] = {
        "patches": spread(cosines),
        "patches_centred": spread(F.cosine_similarity(after - mean, before - mean, dim=-1)),
        "class_token": spread(F.cosine_similarity(patched.tokens[:, 0], dense.tokens[:, 0])),
        "worst_photo": round(cosines.mean(1).min().item(), 4),
    }
    if dense.answers is not None and patched.answers is not None:
        row["answers_kept"] = round((dense.answers == patched.answers).float().mean().item(), 4)
    return row


def spread(cosines: Tensor) -> dict[str, float]:
    """Mean, median, and what 5 % are below."""
    values = cosines.double().flatten().sort().values
    if not values.isfinite().all():
        raise ValueError("features are not finite")
    middle, worst = values[len(values) // 2], values[len(values) // 20]
    figures = {"mean": values.mean(), "median": middle, "worst_5": worst}
    return {name: round(figure.item(), 4) for name, figure in figures.items()}
