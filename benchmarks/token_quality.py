"""Top-1 of a ViT trained on CIFAR-10 (`benchmarks/cifar.py`) when it carries fewer tokens, without
any further training.

``python benchmarks/token_quality.py --data DIR``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cifar
import torch
from common import write
from torch import Tensor, nn

import sparsiattn

DROPS: dict[str, dict[str, Any]] = {
    "cls": {"score": "cls"},
    "cls, fused": {"score": "cls", "fuse": True},
    "mean_query": {"score": "mean_query"},
    "norm": {"score": "norm"},
    "random": {"score": "random"},
}
MERGES: dict[str, dict[str, Any]] = {
    "tome": {},
    "tome, not proportional": {"proportional": False},
    "pitome": {"method": "pitome"},
    "pitome, not proportional": {"method": "pitome", "proportional": False},
}
LAYERS = [2, 4]


def schedules() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, options in DROPS.items():
        for keep in (0.7, 0.5):
            found[f"token_drop {name}, keep={keep}"] = {
                "strategy": "token_drop", "keep": keep, "layers": LAYERS, **options,
            }  # fmt: skip
    for mass in (0.9, 0.7, 0.5):
        found[f"token_drop adaptive, mass={mass}"] = {
            "strategy": "token_drop", "keep": "adaptive", "mass": mass, "layers": LAYERS,
        }  # fmt: skip
    for name, options in MERGES.items():
        for r in (4, 7):
            found[f"token_merge {name}, r={r}"] = {"strategy": "token_merge", "r": r, **options}
    for keep in (0.7, 0.5):
        found[f"hybrid k=0.25 keep={keep}, all sites sparse"] = {
            "strategy": "hybrid", "k": 0.25, "keep": keep, "layers": LAYERS,
            "only_if_faster": False,
        }  # fmt: skip
    return found


@torch.inference_mode()
def mean_tokens(model: nn.Module, images: Tensor, live: sparsiattn.Patch) -> float:
    """Patch tokens that are left at the end, mean over images."""
    counts = []
    for part in images.split(250):
        model(cifar.normalise(part))
        place = live.source()[:, 1:]
        counts += [len(row[row >= 0].unique()) for row in place]
    return round(sum(counts) / len(counts), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=cifar.WEIGHTS)
    parser.add_argument("--images", type=int, default=5000)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = cifar.load(options.weights)
    images, labels = cifar.read(options.data / "cifar10-test.tar")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pick = order[: options.images]
    data = images[pick], labels[pick]
    rows: dict[str, Any] = {}
    for name, schedule in schedules().items():
        with sparsiattn.patch(model, **schedule) as live:
            report = live.report()
            rows[name] = {
                "top1": round(cifar.accuracy(model, *data), 2),
                "tokens_left": mean_tokens(model, data[0][:500], live),
                "macs_saved": None
                if report.macs is None
                else round(1 - report.macs / report.macs_dense, 3),
            }
        print(name, rows[name], flush=True)
    write(
        "token-quality-cifar",
        {
            "model": "timm VisionTransformer, 64 patches and CLS, depth 6, width 128, 4 heads",
            "layers": LAYERS,
            "images": len(pick),
            "dense_top1": round(cifar.accuracy(model, *data), 2),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
