"""A whole model at high resolution, dense and patched, in paired runs.

``python benchmarks/resolution.py`` on a CPU; ``--device cuda --dtype bfloat16 --compile`` with
``--model vit_base_patch16_224 --batch 8`` on a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from common import paired, write

import sparsiattn

CASES: dict[str, dict[str, Any]] = {
    "connectivity k=0.1": {"strategy": "connectivity", "k": 0.1},
    "connectivity k=0.1, tile 16 x 8": {"strategy": "connectivity", "k": 0.1, "tile": (16, 8)},
    "hybrid k=0.1 keep=0.5": {"strategy": "hybrid", "k": 0.1, "keep": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    dtype, where = getattr(torch, options.dtype), options.device
    torch.manual_seed(0)
    dense, sparse = (
        timm.create_model(options.model, img_size=options.size).eval().to(where, dtype)
        for _ in range(2)
    )
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(options.batch, 3, options.size, options.size, device=where, dtype=dtype)
    rows = {}
    with torch.inference_mode():
        base = torch.compile(dense) if options.compile else dense
        for name, case in CASES.items():
            with sparsiattn.patch(sparse, **case) as handle:
                handle.warmup(x)
                run = torch.compile(sparse) if options.compile else sparse
                rows[name] = paired(lambda f=run: f(x), lambda: base(x), options.rounds)  # type: ignore[misc]
                rows[name]["kernels"] = sorted({site.kernel for site in handle.report().sites})
            print(name, rows[name])
    settings = {name: getattr(options, name) for name in ("model", "size", "batch", "dtype")}
    write(f"resolution-{where}", {**settings, "compiled": options.compile, "speedup": rows})


if __name__ == "__main__":
    main()
