"""Attention with and without sparsity, planning included, as ratios to dense SDPA of the same run.

``python benchmarks/kernels.py`` on a CPU, ``--device cuda --dtype bfloat16`` on a GPU, there also
with ``--kernel triton``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import paired, write
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Site
from sparsiattn.planning import finish
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies.connectivity import Connectivity

CASES = [
    (1024, 0.1, (8, 8)),
    (1024, 0.25, (8, 8)),
    (4096, 0.1, (8, 8)),
    (4096, 0.1, (16, 8)),
    (4096, 0.25, (8, 8)),
]


def case(
    n: int, k: float, tile: Any, batch: int, device: str, dtype: Any, rounds: int, kernel: Any
) -> Any:
    """``n`` patch tokens and a CLS token, 6 heads of 64; `connectivity` with its background."""
    q, key, v = (torch.randn(batch, 6, n + 1, 64, device=device, dtype=dtype) for _ in range(3))
    site = Site.of(q, key, v, prefix_tokens=1)
    strategy = Connectivity(k=k, tile=tile)
    planner = strategy.planner(site).to(device, dtype)
    inputs = AttentionInputs(q, key, v, 0.125, None, site, tile=tile)

    def plan() -> Any:
        return finish(planner(inputs), inputs, background=strategy.background)

    pattern = plan()
    return {
        "tokens": n,
        "k": k,
        "tile": tile,
        "batch": batch,
        "with_planning": paired(
            lambda: kernel(inputs, plan()),
            lambda: F.scaled_dot_product_attention(q, key, v),
            rounds,
        ),
        "kernel_only": paired(
            lambda: kernel(inputs, pattern),
            lambda: F.scaled_dot_product_attention(q, key, v),
            rounds,
        ),
        "expected": round(kernel.speed(inputs, pattern), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernel", default="gather")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    rows, kernel = [], REGISTRY.get("kernels", options.kernel)
    with torch.inference_mode():
        for n, k, tile in CASES:
            row = case(n, k, tile, options.batch, options.device, dtype, options.rounds, kernel)
            print(row)
            rows.append(row)
    named = "" if options.kernel == "gather" else f"-{options.kernel}"
    name = f"kernels{named}-{options.device}"
    write(
        name,
        {
            "kernel": options.kernel,
            "device": options.device,
            "dtype": options.dtype,
            "speedup": rows,
        },
    )


if __name__ == "__main__":
    main()
