"""``python benchmarks/key_mass.py``: keys until their votes reach a share of the softmax.

Compares lists of one length (what ``connectivity`` has) with lists that end where the votes of a
tile reach a share of their sum (as sparse-vggt's, arXiv 2509.07120), by their mean number of keys.
Real weights; cosine of class and patch features to the dense model's. No times.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import torch
from quality.models import Subject
from quality.sources import Sources
from torch import Tensor, nn

import sparsiattn
from sparsiattn.attention import TopLogits
from sparsiattn.attention.budget import count_of
from sparsiattn.strategies import Strategy

MODELS = (("saliency_vit_s14", 518), ("clip_vit_b16", 224))
FIXED = ({"k": 0.05}, {"k": 0.1}, {"k": 0.15}, {"k": 0.25})
BY_MASS = tuple(
    {"k": 0.6, "mass": mass, "least": least}
    for mass, least in ((0.5, 0.0), (0.5, 0.05), (0.6, 0.07), (0.7, 0.05), (0.75, 0.1), (0.9, 0.0))
)


@dataclass(frozen=True)
class KeyMass(Strategy):
    """As ``connectivity``, with lists that end at a share of the votes.

    Args:
        k: Share of keys at most.
        mass: Share of the votes at which a list ends; None for lists of ``k`` keys.
        least: Share of keys at least.
    """

    name = "key_mass"
    k: float = 0.6
    mass: float | None = None
    least: float = 0.0
    shares: list[float] = field(default_factory=list, compare=False)

    def plan(self, inputs: sparsiattn.AttentionInputs) -> sparsiattn.Pattern:
        scores = TopLogits.of(inputs, self.k).ranked().scores
        if inputs.tiles is None:
            scores = scores.softmax(-1)[..., inputs.prefix :, :]
        first = torch.arange(inputs.n_keys, device=scores.device) < inputs.prefix
        count = count_of(self.k, inputs.n_keys)
        best = scores.masked_fill(first, float("inf")).topk(count, dim=-1).indices
        kept = self._kept(scores, best, inputs)
        rows = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, kept)
        rows = rows if inputs.tiles is None else inputs.tiles.spread(rows)
        full = rows.new_ones(*rows.shape[:2], inputs.prefix, inputs.n_keys)
        return sparsiattn.Pattern.mask(torch.cat([full, rows], dim=-2))

    def _kept(self, scores: Tensor, best: Tensor, inputs: sparsiattn.AttentionInputs) -> Tensor:
        """Which of the best keys a list keeps, in the same order."""
        count, place = best.shape[-1], torch.arange(best.shape[-1], device=best.device)
        lengths = torch.full_like(best[..., :1], count)
        if self.mass is not None:
            reached = scores.gather(-1, best).cumsum(-1) >= self.mass * scores.sum(-1, keepdim=True)
            least = max(inputs.prefix + 1, int(self.least * inputs.n_keys))
            lengths = (1 + (~reached).sum(-1, keepdim=True)).clamp(least, count)
        if not best.is_meta:
            self.shares.append(lengths.float().mean().item() / inputs.n_keys)
        return place < lengths


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model.forward_features(part) for part in images.split(2)])  # type: ignore[operator]


def row(model: Any, images: Tensor, dense: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    strategy = KeyMass(background="auto", **options)
    with sparsiattn.patch(model, strategy, kernel="sdpa"):
        strategy.shares.clear()  # of the dry run
        cosines = torch.cosine_similarity(features(model, images), dense, dim=-1)
    patches = cosines[:, model.num_prefix_tokens :]
    return {
        **options,
        "share": round(fmean(strategy.shares), 4),
        "patches": round(patches.mean().item(), 5),
        "patches_worst_5": round(patches.flatten().quantile(0.05).item(), 5),
        "class": round(cosines[:, 0].mean().item(), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder of loaders and photos")
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=4)
    given = parser.parse_args()
    sources, rows = Sources(given.shared, given.wheels), []
    for name, size in MODELS:
        subject = Subject(name, size)
        model, images = subject.model(sources), subject.images(sources, given.photos)
        dense = features(model, images)
        for options in (*FIXED, *BY_MASS):
            rows.append({"model": name, "size": size, **row(model, images, dense, options)})
            print(rows[-1], flush=True)
            common.write("key-mass", {"photos": given.photos, "rows": rows})


if __name__ == "__main__":
    main()
