"""Peak memory of one attention call, dense and by sparse kernels, each in a process of its own.

``python benchmarks/memory.py`` on a CPU (Linux: it reads ``VmHWM``), ``--device cuda`` on a GPU.
``--kernels`` names other kernels than ``gather`` and, on a CPU, ``native``.
Operands are counted; what the process holds besides (libraries, the index tables that all layers of
one resolution share) is not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import write
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Site
from sparsiattn.kernels.workspace import SCRATCH
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import Connectivity, finish

HEADS, WIDTH = 6, 64


def call(n: int, kind: str, device: str, dtype: Any) -> Any:
    """A function that runs the attention once, and the bytes of its operands."""
    q, k, v = (torch.randn(1, HEADS, n + 1, WIDTH, device=device, dtype=dtype) for _ in range(3))
    operands = 3 * q.numel() * q.element_size()
    if kind == "dense":
        return lambda: F.scaled_dot_product_attention(q, k, v), operands
    site, strategy = Site.of(q, k, v, prefix_tokens=1), Connectivity(k=0.1)
    planner, kernel = strategy.planner(site).to(device, dtype), REGISTRY.get("kernels", kind)
    inputs = AttentionInputs(
        q, k, v, WIDTH**-0.5, None, site,
        tile=strategy.tile_for(n + 1), block=strategy.block_for(n + 1),
    )  # fmt: skip

    def run() -> Any:
        return kernel(inputs, finish(planner(inputs), inputs, background=2))

    with torch.inference_mode():  # tables of this resolution, which all layers share
        kernel.warmup(inputs, finish(planner(inputs), inputs, background=2))
        finish(planner(inputs), inputs, background=2)
        SCRATCH.clear()  # what the kernel keeps from call to call counts
    return run, operands


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(n: int, kind: str, device: str, dtype: Any) -> int:
    """Bytes of the operands and of all that one call added at its peak."""
    run, operands = call(n, kind, device, dtype)
    with torch.inference_mode():
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            return int(operands + torch.cuda.max_memory_allocated() - before)
        call(65, kind, device, dtype)[0]()  # libraries load what they need
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return int(operands + _status("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--one", nargs=2, metavar=("TOKENS", "KIND"))
    options = parser.parse_args()
    kernels = options.kernels or (["gather"] if options.device == "cuda" else ["native", "gather"])
    if options.one:
        n, kind = int(options.one[0]), options.one[1]
        print(peak(n, kind, options.device, getattr(torch, options.dtype)))
        return
    rows = []
    for n in (1024, 4096, 16384):
        found = {kind: _in_process(n, kind, options) for kind in ("dense", *kernels)}
        megabytes = {kind: round(size / 1e6, 1) for kind, size in found.items()}
        ratios = {kind: round(found[kind] / found["dense"], 3) for kind in kernels}
        rows.append({"tokens": n, "mb": megabytes, "ratio": ratios})
        print(rows[-1])
    content = {"heads": HEADS, "head_dim": WIDTH, "k": 0.1, "rows": rows}
    write(f"memory-{options.device}", {"dtype": options.dtype, **content})


def _in_process(n: int, kind: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--device", options.device, "--dtype", options.dtype]
    done = subprocess.run([*command, "--one", str(n), kind], capture_output=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
