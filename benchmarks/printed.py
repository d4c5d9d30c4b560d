"""What the README's lines print: ``bench`` of its five lines, and ``recommend`` on real weights.

``python benchmarks/printed.py --shared DIR --wheels DIR``, alone on the machine. Weights and photos
are those of ``python benchmarks/quality``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from common import write
from quality.models import SUBJECTS
from quality.sources import Sources

import sparsiattn

PHOTOS, SPEEDUPS = 8, (1.4, 2.0)


def bench() -> dict[str, Any]:
    """The README's five lines."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518).eval()
    images = torch.randn(1, 3, 518, 518)
    with sparsiattn.patch(model, "token_merge"):
        result = sparsiattn.bench(model, images, sites=False)
    figures = {"ratio": result.ratio, "ratio_quartiles": result.ratio_quartiles}
    return {"text": str(result), **figures}


def recommend(sources: Sources, speedup: float) -> dict[str, Any]:
    """A goal of speed, eight photos, the default budget."""
    subject = SUBJECTS["s14-518"]
    model, images = subject.model(sources), subject.images(sources, PHOTOS)
    found = sparsiattn.recommend(model, images, speedup=speedup, progress=False)
    return {"text": str(found), **found.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True)
    given = parser.parse_args()
    sources = Sources(given.shared, given.wheels)
    goals = {str(speedup): recommend(sources, speedup) for speedup in SPEEDUPS}
    write("printed-cpu", {"bench": bench(), "recommend": goals})


if __name__ == "__main__":
    main()
