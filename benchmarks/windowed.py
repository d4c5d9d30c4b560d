"""Models in windows: time of whole windows, or MLPs, skipped against the unpatched model, and what
becomes of its last map. Weights are random: speed does not depend on them, quality does.
``python benchmarks/windowed.py``"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from common import write
from torch import Tensor, nn

import sparsiattn
from sparsiattn.runtime import timing
from sparsiattn.runtime.timing import Timing

FIRST, BOTH, THREE = [0, 1], [0, 1, 2, 3], list(range(10))
"""Blocks of the first stage of a tiny Swin, of the first two and of the first three."""
WINDOW = {"strategy": "token_drop", "score": "norm", "skip": "window"}
MLP = {"strategy": "token_drop", "score": "norm"}
SCHEDULES: dict[str, dict[str, Any]] = {
    # the host with the fused attention that every patch switches on, and nothing skipped
    "nothing skipped": {**WINDOW, "keep": 1.0},
    "windows, stage 1, keep 0.25": {**WINDOW, "keep": 0.25},
    "windows, stage 1, keep 0.5": {**WINDOW, "keep": 0.5},
    "windows, stage 1, keep 0.25, random": {**WINDOW, "keep": 0.25, "score": "random"},
    "windows, stages 1 and 2, keep 0.25 and 0.75": {
        **WINDOW, "keep": [0.25, 0.25, 0.75, 0.75], "layers": BOTH,
    },
    "windows, stages 1 and 2, keep 0.5": {**WINDOW, "keep": 0.5, "layers": BOTH},
    "windows, stages 1 to 3, keep 0.75": {**WINDOW, "keep": 0.75, "layers": THREE},
    "MLP, stage 1, keep 0.25": {**MLP, "keep": 0.25, "layers": [0]},
    "MLP, stages 1 to 3, keep 0.5": {**MLP, "keep": 0.5, "layers": [0, 2, 4]},
}  # fmt: skip


def images(batch: int, side: int) -> Tensor:
    """Smooth images whose detail is in some places only, as that of photographs is."""
    generator = torch.Generator().manual_seed(3)

    def noise(channels: int, size: int) -> Tensor:
        drawn = torch.randn(batch, channels, size, size, generator=generator)
        return nn.functional.interpolate(drawn, size=side, mode="bicubic")

    return noise(3, 7) + 0.4 * noise(3, 56) * (noise(1, 7) > 0)


@dataclass(frozen=True)
class Subject:
    """A model, a copy that is never patched, and what they are given."""

    model: Any
    host: Any
    images: Tensor

    def row(self, options: dict[str, Any], rounds: int) -> dict[str, Any]:
        """Speed in paired runs, and quality beside it."""
        with torch.inference_mode(), sparsiattn.patch(self.model, **options) as live:
            calls: dict[str, Callable[[], Any]] = {
                "patched": lambda: self.model(self.images),
                "dense": lambda: self.host(self.images),
            }
            times = timing.alternate(calls, rounds)
            last, dense = self._maps()
            report = live.report()
        cosine = nn.functional.cosine_similarity(last, dense, dim=-1)
        macs = None if report.macs is None else round(report.macs_dense / report.macs, 3)
        return {
            **Timing.of(times["patched"], times["dense"]).to_dict(),
            "fastest_ratio": round(min(times["dense"]) / min(times["patched"]), 3),
            "macs_ratio": macs,
            "cosine": round(float(cosine.mean()), 4),
            "cosine_of_the_worst_token": round(float(cosine.min()), 4),
        }

    def _maps(self) -> tuple[Tensor, ...]:
        return tuple(m.forward_features(self.images) for m in (self.model, self.host))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--only", help="part of a schedule's name")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    found: dict[str, dict[str, Any]] = {}
    for batch in options.batches:
        side = model.pretrained_cfg["input_size"][-1]
        subject = Subject(model, copy.deepcopy(model), images(batch, side))
        for name, schedule in SCHEDULES.items():
            if options.only and options.only not in name:
                continue
            row = subject.row(schedule, options.rounds)
            found.setdefault(f"batch {batch}", {})[name] = row
            print(f"batch {batch}, {name}: {row}", flush=True)
    if not options.only:
        write("windowed", {"model": options.model, "weights": "random", "rows": found})


if __name__ == "__main__":
    main()
