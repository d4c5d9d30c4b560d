"""What is left of a model's final features and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quality.variants import Variant


@dataclass(frozen=True)
class Features:
    """What a model says of some photos.

    Attributes:
        tokens: After the last norm, ``[photos, prefix + N, C]``, the class token first.
        prefix: How many of them are no patches.
        answers: Index of the name that fits best, ``[photos]``; None without text vectors.
        saliency: Of every pixel, ``[photos, 1, S, S]``, 0 to 1; None without a decoder.
    """

    tokens: Tensor
    prefix: int
    answers: Tensor | None = None
    saliency: Tensor | None = None

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        made: Variant,
        images: Tensor,
        *,
        batch: int,
        text: Tensor | None = None,
        decoder: Any = None,
    ) -> Features:
        """Of a timm ViT. ``forward_features`` gives every patch, also where tokens were dropped.

        Args:
            made: The model.
            images: Of the dense model's size, ``[photos, 3, S, S]``.
            batch: Images at once.
            text: Vectors of names, one a row.
            decoder: Gives saliency of patch tokens ``[B, N, C]`` and a size.
        """
        size = images.shape[-1]
        grid, prefix = size // made.model.patch_embed.patch_size[0], made.model.num_prefix_tokens
        tokens = torch.cat([made.tokens(part, grid) for part in images.split(batch)])
        answers = saliency = None
        if text is not None:
            head = made.model.forward_head(tokens.to(made.dtype)).float()
            answers = (head @ text.T).argmax(-1)
        if decoder is not None:
            parts = [decoder(part, size) for part in tokens[:, prefix:].split(batch)]
            saliency = torch.cat(parts).sigmoid()
        return cls(tokens, prefix, answers, saliency)


@torch.inference_mode()
def named(made: Variant, images: Tensor, text: Tensor, batch: int) -> Tensor:
    """Index of the name that fits each image best, ``[images]``."""
    given = [made.images(part) for part in images.split(batch)]
    embeddings = torch.cat([made.model(part).float() for part in given])
    return (embeddings @ text.T).argmax(-1)


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
    if dense.saliency is not None and patched.saliency is not None:
        error = (dense.saliency - patched.saliency).abs().mean()
        row["saliency_error"] = round(error.item(), 4)
    return row


def spread(cosines: Tensor) -> dict[str, float]:
    """Mean, median, and what 5 % are below."""
    values = cosines.double().flatten().sort().values
    if not values.isfinite().all():
        raise ValueError("features are not finite")
    middle, worst = values[len(values) // 2], values[len(values) // 20]
    figures = {"mean": values.mean(), "median": middle, "worst_5": worst}
    return {name: round(figure.item(), 4) for name, figure in figures.items()}
