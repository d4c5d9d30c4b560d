"""What is left of a model's final features and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WORST = 0.05


@dataclass(frozen=True)
class Features:
    """What a model says of some photos.

    Attributes:
        patches: Patch tokens after the last norm, ``[photos, N, C]``.
        classes: The class token after it, ``[photos, C]``.
        answers: Index of the name that fits best, ``[photos]``; None without text vectors.
    """

    patches: Tensor
    classes: Tensor
    answers: Tensor | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, images: Tensor, text: Tensor | None, batch: int) -> Features:
        """Of a timm ViT. ``forward_features`` gives every patch, also where tokens were dropped."""
        tokens = torch.cat([model.forward_features(part) for part in images.split(batch)])
        answers = None if text is None else (model.forward_head(tokens) @ text.T).argmax(-1)
        return cls(tokens[:, model.num_prefix_tokens :], tokens[:, 0], answers)


def compare(dense: Features, patched: Features) -> dict[str, Any]:
    """Cosines to the dense model's features, and the share of answers that stay, as JSON."""
    centre = dense.patches.mean((0, 1))
    plain = F.cosine_similarity(patched.patches, dense.patches, dim=-1)
    centred = F.cosine_similarity(patched.patches - centre, dense.patches - centre, dim=-1)
    classes = F.cosine_similarity(patched.classes, dense.classes, dim=-1)
    row: dict[str, Any] = {
        "patches": spread(plain),
        "patches_centred": spread(centred),
        "worst_photo": round(plain.mean(1).min().item(), 4),
        "class_token": spread(classes),
    }
    if dense.answers is not None and patched.answers is not None:
        row["answers_kept"] = round((dense.answers == patched.answers).float().mean().item(), 4)
    return row


def spread(cosines: Tensor) -> dict[str, float]:
    """Mean, median, and the largest of the worst 5 %."""
    values = cosines.double().flatten().sort().values
    if not values.isfinite().all():
        raise ValueError("features are not finite")
    worst = values[: max(1, int(WORST * len(values)))]
    figures = {"mean": values.mean(), "median": values.quantile(0.5), "worst_5": worst[-1]}
    return {name: round(figure.item(), 4) for name, figure in figures.items()}
