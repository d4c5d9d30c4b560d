"""Block masks on the CPU: time of masked SDPA, dense SDPA and the gather kernel, one JSON file.

python benchmarks/blockmask.py --out benchmarks/results/blockmask-cpu.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Site, block_mask
from sparsiattn.kernels import Gather


def masks(n: int) -> dict[str, Tensor]:
    """Boolean ``[1, 1, N, N]`` by name."""
    generator = torch.Generator().manual_seed(0)
    at = torch.arange(n)
    gap = (at[:, None] - at).abs()
    fibonacci = [0, 1, 2]
    while fibonacci[-1] < n:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    place = torch.randperm(n, generator=generator)
    top = torch.rand(n, n, generator=generator).topk(n // 4, dim=-1).indices
    found = {
        "band": gap <= n // 32,
        "blocky": at[:, None] * 8 // n == at * 8 // n,
        "fibonacci": torch.isin(gap, torch.tensor(fibonacci)),
        "hidden band": (place[:, None] - place).abs() <= n // 32,
        "random 25 %": torch.zeros(n, n, dtype=torch.bool).scatter(1, top, True),
    }
    return {name: mask[None, None] for name, mask in found.items()}


def fastest(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least milliseconds of each call; they take turns, so that a noisy spell hits all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def row(name: str, mask: Tensor, inputs: AttentionInputs, rounds: int) -> list[dict[str, object]]:
    q, k, v = inputs.q, inputs.k, inputs.v
    kernel, found = Gather(), []
    reorders = (False,) if name == "blocky" else (False, True)
    for reorder in reorders:
        start = time.perf_counter()
        pattern = block_mask(mask, tile=64, block=32, reorder=reorder)
        making = 1e3 * (time.perf_counter() - start)
        times = fastest(
            {
                "dense": lambda: F.scaled_dot_product_attention(q, k, v),
                "masked": lambda: F.scaled_dot_product_attention(q, k, v, mask),
                "blocks": lambda p=pattern: kernel(inputs, p),  # type: ignore[misc]
            },
            rounds,
        )
        n, width = inputs.n_keys, q.shape[-1] + v.shape[-1]
        dense = n * n * width
        found.append({
            "n": n, "mask": name, "reorder": reorder, "making_ms": round(making, 2),
            **{f"{what}_ms": round(ms, 3) for what, ms in times.items()},
            "speed_over_masked": round(times["masked"] / times["blocks"], 2),
            "speed_over_dense": round(times["dense"] / times["blocks"], 2),
            "ideal_share": round(pattern.ideal_macs(width) / dense, 4),
            "active_share": round(pattern.active_macs(width) / dense, 4),
            "computed_share": round(pattern.computed_macs(width) / dense, 4),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    for n, rounds in ((197, 20), (1024, 8), (4096, 2)):
        q, k, v = torch.randn(3, 1, 3, n, 64, generator=torch.Generator().manual_seed(1)).unbind(0)
        site = Site.of(q, k, v, prefix_tokens=0, grid=(1, n), key_grid=(1, n), bias="none")
        inputs = AttentionInputs(q, k, v, 0.125, None, site)
        with torch.no_grad():
            for name, mask in masks(n).items():
                rows += row(name, mask, inputs, rounds)
    about = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "batch": 1, "heads": 3,
        "dim": 64, "tile": 64, "block": 32, "clock": "least of alternating calls",
    }  # fmt: skip
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
