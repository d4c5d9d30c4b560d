"""Token strategies on DeiT-S at 224 pixels: time against the unpatched model, in paired runs.
``python benchmarks/tokens.py``"""

from __future__ import annotations

import argparse
from statistics import median, quantiles
from typing import Any

import timm
import torch
from common import fastest_ms, write

import sparsiattn

SCHEDULES: dict[str, dict[str, Any]] = {
    "token_drop keep=0.7": {"strategy": "token_drop", "keep": 0.7},
    # the same counts as r=13 without any search for them: what merging could reach at best
    "token_drop random, counts of r=13": {
        "strategy": "token_drop", "score": "random", "layers": list(range(12)),
        "keep": [196 - 13 * (i + 1) for i in range(12)],
    },
    "token_drop keep=0.7, fused": {"strategy": "token_drop", "keep": 0.7, "fuse": True},
    "token_drop keep=0.5": {"strategy": "token_drop", "keep": 0.5},
    "token_drop adaptive, mass=0.6": {"strategy": "token_drop", "keep": "adaptive", "mass": 0.6},
    "token_merge": {"strategy": "token_merge"},
    "token_merge r=13": {"strategy": "token_merge", "r": 13},
    "token_merge r=13, not proportional": {
        "strategy": "token_merge", "r": 13, "proportional": False,
    },
    "token_merge pitome, ratio=0.9125": {
        "strategy": "token_merge", "method": "pitome", "ratio": 0.9125,
    },
    "hybrid k=0.25 keep=0.7": {"strategy": "hybrid", "k": 0.25, "keep": 0.7},
    "hybrid k=0.25 keep=0.5": {"strategy": "hybrid", "k": 0.25, "keep": 0.5},
}  # fmt: skip


def speed_up(
    model: torch.nn.Module, x: torch.Tensor, options: dict[str, Any], rounds: int, repeats: int
) -> dict[str, Any]:
    """Dense time over patched time, each side of a round the fastest of some forwards."""
    ratios: list[float] = []
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for turn in range(rounds):
            took = {}
            for patched in (True, False) if turn % 2 else (False, True):
                if patched:
                    sparsiattn.patch(model, **options)
                took[patched] = fastest_ms(lambda: model(x), repeats)
                sparsiattn.unpatch(model)
                times[patched].append(took[patched])
            ratios.append(took[False] / took[True])
    low, middle, high = quantiles(ratios, n=4)
    with sparsiattn.patch(model, **options) as live:
        report = live.report()
    dense = report.macs_dense
    return {
        "speedup": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "macs_ratio": None if report.macs is None else round(dense / report.macs, 3),
        "dense_ms": round(median(times[False]), 2),
        "patched_ms": round(median(times[True]), 2),
        "rounds": rounds,
        "forwards_a_side": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", help="part of a schedule's name")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = timm.create_model(options.model).eval().to(options.device, dtype)
    found: dict[str, dict[str, Any]] = {}
    for batch, repeats in ((8, 2), (1, 6)):
        size = model.pretrained_cfg["input_size"]
        x = torch.randn(batch, *size, device=options.device, dtype=dtype)
        for name, schedule in SCHEDULES.items():
            if options.only and options.only not in name:
                continue
            row = speed_up(model, x, schedule, options.rounds, repeats)
            found.setdefault(f"batch {batch}", {})[name] = row
            print(f"batch {batch}, {name}: {row}", flush=True)
    if not options.only:
        kind = "cpu" if options.device == "cpu" else "cuda"
        write(f"tokens-{kind}", {"model": options.model, "speedup": found})


if __name__ == "__main__":
    main()
