"""The share of exact attention mass that each strategy's mask keeps, relative to the exact top-k
mask, on a ViT trained on CIFAR-10 (`benchmarks/cifar.py`) and patched without any training.

``python benchmarks/cifar_quality.py --data DIR``
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import cifar
import torch
from common import write
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AttentionInputs, Planner, Site
from sparsiattn.strategies import finish

BUDGETS = (0.1, 0.25, 0.5)
MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "topk, 2x2 query tiles": ("topk", {"tile": (2, 2)}),
    "connectivity, untrained": ("connectivity", {}),
    "connectivity, untrained, 2x2 query tiles": ("connectivity", {"tile": (2, 2)}),
    "local": ("local", {}),
    "random": ("random", {}),
}


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "connectivity, untrained, without salience": ("connectivity", {"mean_query_boost": False}),
    "connectivity, untrained, without own keys": ("connectivity", {"self_weight": None}),
    "connectivity, untrained, without either": (
        "connectivity",
        {"mean_query_boost": False, "self_weight": None},
    ),
}


@torch.inference_mode()
def kept_mass(model: nn.Module, images: Tensor, strategy: str, k: float, **options: Any) -> float:
    """Mean over patch queries, heads and layers of the exact attention inside the mask. Layers see
    dense inputs, so every strategy is judged on the same attention."""
    masses: list[Tensor] = []

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        mask = finish(planner(inputs), inputs).to_mask()
        kept = inputs.logits().softmax(-1) * mask
        masses.append(kept.sum(-1)[..., inputs.prefix :].mean())

    with sparsiattn.patch(model, strategy, k=k, **options) as live, live.observing(observe):
        for part in images.split(250):
            model(cifar.normalise(part))
    return float(torch.stack(masses).mean())


def mass_table(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for k in BUDGETS:
        oracle = kept_mass(model, images, "topk", k)
        for name, (strategy, options) in (MASKS | PLAIN).items():
            share = kept_mass(model, images, strategy, k, **options)
            table[name][str(k)] = round(share / oracle, 4)
        table["exact top-k, absolute"][str(k)] = round(oracle, 4)
    return dict(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=cifar.WEIGHTS)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = cifar.load(options.weights)
    images, labels = cifar.read(options.data / "cifar10-test.tar")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pick = order[: options.images]
    mass = mass_table(model, images[pick])
    about = "timm VisionTransformer, 64 patches and CLS, depth 6, width 128, 4 heads"
    write(
        "quality-cifar",
        {"model": about, "images": len(pick), "mass_relative_to_exact_topk": mass},
    )


if __name__ == "__main__":
    main()
