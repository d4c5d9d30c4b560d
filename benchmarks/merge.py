"""Merged tokens against a plain PyTorch rewrite of their paper, on DeiT-S at 224 pixels: dense,
rewrite and ours in turn. ``python benchmarks/merge.py``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import quantiles
from typing import Any

import timm
import torch
from common import fastest_ms, write
from rivals import tome

import sparsiattn

R = 13


def models(name: str) -> dict[str, torch.nn.Module]:
    """The same weights three times."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    ours = deepcopy(dense)
    sparsiattn.patch(ours, "token_merge", r=R).warmup(torch.zeros(1, 3, 224, 224))
    return {"dense": dense, "rewrite": tome.apply(deepcopy(dense), R), "ours": ours}


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Fastest of some calls of each, in every round, whose order turns."""
    names = list(calls)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            took[name].append(fastest_ms(calls[name], repeats))
    return took


def row(took: dict[str, list[float]]) -> dict[str, Any]:
    """Quartiles of the ratios of each round."""
    pairs = {
        "rewrite": ("dense", "rewrite"),
        "ours": ("dense", "ours"),
        "ours_over_rewrite": ("rewrite", "ours"),
    }
    found: dict[str, Any] = {f"{name}_ms": round(min(ms), 2) for name, ms in took.items()}
    for name, (slow, fast) in pairs.items():
        ratios = [a / b for a, b in zip(took[slow], took[fast], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        found[name] = round(middle, 3)
        found[f"{name}_quartiles"] = [round(low, 3), round(high, 3)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    three, found = models(options.model), {}
    for batch, repeats in ((1, 6), (8, 2)):
        x = torch.randn(batch, 3, 224, 224)
        with torch.inference_mode():
            outs = {name: model(x) for name, model in three.items()}
            calls: dict[str, Callable[[], Any]] = {
                name: partial(model, x) for name, model in three.items()
            }
            took = in_turn(calls, options.rounds, repeats)
        apart = float((outs["ours"] - outs["rewrite"]).abs().max())
        found[f"batch {batch}"] = {**row(took), "largest_difference": apart}
        print(f"batch {batch}: {found[f'batch {batch}']}", flush=True)
    content = {"model": options.model, "r": R, "rounds": options.rounds, "speedup": found}
    write("merge-cpu", content)


if __name__ == "__main__":
    main()
