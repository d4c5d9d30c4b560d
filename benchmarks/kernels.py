"""Attention with and without sparsity, planning included, as ratios to dense SDPA of the same run.

``python benchmarks/kernels.py`` on a CPU, ``--device cuda --dtype bfloat16`` on a GPU; ``--kernel
native`` (or ``triton``, ``flex``) for another than ``gather``; ``--sweep`` for the shapes that
`benchmarks/plots.py` draws; it says what each field is.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import paired, roof, write
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Site
from sparsiattn.kernels import CallShape, refusals
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import Connectivity, finish

CASES = [
    (1024, 0.1, (8, 8)),
    (1024, 0.1, (16, 16)),
    (1024, 0.25, (8, 8)),
    (4096, 0.1, (8, 8)),
    (4096, 0.1, (16, 8)),
    (4096, 0.1, (16, 16)),
    (4096, 0.25, (8, 8)),
    (4096, 0.25, (16, 8)),
]
LONG = [(16384, 0.1, (8, 8)), (16384, 0.1, (16, 8))]

SWEEP = [(n * n, k, (8, 8)) for n in (16, 24, 32, 48, 64) for k in (0.05, 0.1, 0.25, 0.5)]


def case(
    n: int, k: float, tile: Any, batch: int, device: str, dtype: Any, rounds: int, kernel: Any
) -> Any:
    """``n`` patch tokens and a CLS token, 6 heads of 64; `connectivity` with its background.

    If the kernel refuses the call, the row says why.
    """
    packed = torch.randn(batch, n + 1, 3, 6, 64, device=device, dtype=dtype)
    q, key, v = packed.permute(2, 0, 3, 1, 4)  # laid out as hosts hand them over
    site = Site.of(q, key, v, prefix_tokens=1)
    strategy = Connectivity(k=k, tile=tile)
    planner = strategy.planner(site).to(device, dtype)
    block = strategy.block_for(site.keys)
    inputs = AttentionInputs(q, key, v, 0.125, None, site, tile=tile, block=block)

    def plan() -> Any:
        return finish(
            planner(inputs),
            inputs,
            background=strategy.background_for(inputs.key_grid, inputs.key_views),
        )

    pattern = plan()
    reasons = refusals(kernel, inputs, pattern)
    if reasons:
        return {"tokens": n, "k": k, "tile": tile, "batch": batch, "refused": reasons}
    kernel.warmup(inputs, pattern)
    shape = CallShape.of(inputs)
    # kernels that say their speed themselves count no work: at least the pairs are known
    work = kernel.work(inputs, pattern) or shape.attending(pattern.pairs() or 0.0)
    return {
        "tokens": n,
        "heads": shape.heads,
        "dim": shape.dim,
        "k": k,
        "density": round((pattern.pairs() or 0.0) / (n + 1) ** 2, 4),
        "tile": tile,
        "batch": batch,
        "macs": {"dense": shape.dense.macs, "sparse": work.macs},
        "bytes": {
            "dense": shape.rows_bytes(shape.queries + shape.keys),
            "sparse": shape.rows_bytes(shape.queries) + work.bytes,
        },
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
        "planning": paired(plan, lambda: F.scaled_dot_product_attention(q, key, v), rounds),
        "expected": round(kernel.speed(inputs, pattern), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--kernel", default="gather")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    kernel = REGISTRY.get("kernels", options.kernel)
    named = "" if options.kernel == "gather" else f"-{options.kernel}"
    name = f"kernels{named}{'-sweep' if options.sweep else ''}-{options.device}"
    cases = SWEEP if options.sweep else CASES + (LONG if options.device == "cuda" else [])
    with torch.inference_mode():
        found: dict[str, Any] = {
            "kernel": options.kernel,
            "device": options.device,
            "dtype": options.dtype,
            "roof": roof(options.device, dtype),
            "speedup": [],
        }
        for n, k, tile in cases:
            row = case(n, k, tile, options.batch, options.device, dtype, options.rounds, kernel)
            print(row)
            found.setdefault("refused" if "refused" in row else "speedup", []).append(row)
            write(name, found)  # what is measured stays, whatever ends this run


if __name__ == "__main__":
    main()
