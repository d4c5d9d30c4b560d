"""What patching itself costs: a model patched with `dense` against the same model unpatched, also
with the hooks that sparse sites have, and how long `patch` takes. ``python benchmarks/overhead.py``
"""

from __future__ import annotations

import argparse
import time
from statistics import median, quantiles
from typing import Any

import timm
import torch
from common import fastest_ms, write

import sparsiattn
from sparsiattn.runtime.patch_state import hook_idle_sites


def forward_overhead(name: str, rounds: int, hooked: bool, repeats: int = 8) -> dict[str, Any]:
    """One model, patched and unpatched in turn, so that both run on the same memory. Each side of a
    round is the fastest of some forwards after one to warm up; the order turns each round.
    ``hooked``: with hooks at every site, which dense sites have only while something reads them."""
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    ratios: list[float] = []
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for turn in range(rounds):
            took = {}
            for patched in (True, False) if turn % 2 else (False, True):
                if patched:
                    patch = sparsiattn.patch(model, "dense")
                    if hooked:
                        hook_idle_sites(patch)
                took[patched] = fastest_ms(lambda: model(x), repeats)
                sparsiattn.unpatch(model)
                times[patched].append(took[patched])
            ratios.append(took[True] / took[False])
    low, middle, high = quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "unpatched_ms": round(median(times[False]), 3),
        "patched_ms": round(median(times[True]), 3),
        "rounds": rounds,
        "forwards_a_side": repeats,
    }


def patch_seconds(name: str, repeats: int = 15) -> dict[str, float]:
    """The first call for a model of this architecture, and the median of all later calls."""
    model = timm.create_model(name).eval()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        live = sparsiattn.patch(model, strategy="connectivity", k=0.1)
        times.append(time.perf_counter() - start)
        live.unpatch()
    return {"first": round(times[0], 3), "later": round(median(times[1:]), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # before anything else is patched: the very first call imports what it needs
    seconds = {n: patch_seconds(n) for n in ("deit_tiny_patch16_224", "vit_large_patch16_224")}
    name = "deit_tiny_patch16_224"
    parts = {"dense_patched_over_unpatched": False, "with_hooks_over_unpatched": True}
    found = {key: {name: forward_overhead(name, options.rounds, on)} for key, on in parts.items()}
    print(found, seconds)
    write("overhead-cpu", {**found, "patch_seconds": seconds})


if __name__ == "__main__":
    main()
