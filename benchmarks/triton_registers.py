"""Registers, shared memory and spills of the Triton kernels, compiled for GPUs that are not there.

    python benchmarks/triton_registers.py [--only NAME] [--capability 80 90 100] [--out FOLDER]

It needs triton and its ptxas, and no GPU. Rows of earlier runs are kept unless they are made again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine
from torch import Tensor

BATCH, HEADS, PREFIX = 8, 6, 1
HALF = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of one packed projection of ``n`` patches and a CLS token."""
    packed = empty(BATCH, n + PREFIX, 3, HEADS, dim, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return q, k, v


def attention_call(dim: int, dtype: torch.dtype, tile: int) -> Any:
    """Tiles that attend to 410 of 4,097 keys and 64 summary keys."""
    from sparsiattn.kernels._triton import launch

    q, k, v = operands(4096, dim, dtype)
    tiles, cells = 4096 // tile, 64
    ids = torch.int64
    pooled_k, pooled_v = (empty(BATCH, HEADS, cells, dim, dtype=dtype) for _ in range(2))
    return launch.KeyListOperands(
        q, k, v, pooled_k, pooled_v, None,
        empty(BATCH, HEADS, tiles, cells, dtype=torch.float32),
        order=empty(tiles, tile, dtype=ids), weight=None,
        chosen=empty(BATCH, HEADS, tiles, 410, dtype=ids), held=None, table=None,
        first=PREFIX, prefix=0, keys=410, scale=dim**-0.5, lowest=None,
    )  # fmt: skip


def attention(
    dim: int, dtype: torch.dtype = HALF, tile: int = 64, *, backward: bool = False
) -> Any:
    """Forward pass, or the backward pass that adds the gradients of keys atomically."""
    from sparsiattn.kernels._triton import launch

    call = attention_call(dim, dtype, tile)
    out, lse = _results(call)
    if not backward:
        return launch.forward(call, out, lse)
    others = (call.k, call.v, call.pooled_k, call.pooled_v)
    sums = [empty(*x.shape, dtype=torch.float32) for x in others]
    return launch.backward(call, out, lse, out, [call.q, *sums, None, None])


def query_gradients(dim: int, dtype: torch.dtype = HALF) -> Any:
    """The backward pass that leaves the gradients of keys to another kernel."""
    from sparsiattn.kernels._triton import launch

    call = attention_call(dim, dtype, 64)
    out, lse = _results(call)
    return launch.backward(call, out, lse, out, [call.q, *[None] * 6])


def key_gradients(dim: int, dtype: torch.dtype = HALF, *, summary: bool = False) -> Any:
    """Gradients of keys and values, or of summary keys and values, without atomic additions."""
    from sparsiattn.kernels._triton import key_gradients as kernel

    call = attention_call(dim, dtype, 64)
    out, lse = _results(call)
    if summary:
        return kernel.of_cells(call, lse, lse, out, call.pooled_k, call.pooled_v)
    member = empty(BATCH, HEADS, 64, 4097, dtype=torch.uint8)
    to_k, to_v = (empty(*x.shape, dtype=dtype) for x in (call.k, call.v))
    return kernel.of_keys(call, lse, lse, out, member, to_k, to_v)


def _results(call: Any) -> tuple[Tensor, Tensor]:
    shape = (BATCH, HEADS, call.q.shape[2])
    return torch.empty_like(call.q), empty(*shape, dtype=torch.float32)


def pool(dim: int, dtype: torch.dtype = HALF) -> Any:
    """Means of 64 keys and values in each of 64 cells."""
    from sparsiattn.kernels._triton import pool as kernel

    _, k, v = operands(4096, dim, dtype)
    members, sizes = empty(64, 64, dtype=torch.int64), empty(64, dtype=torch.int64)
    means = (empty(BATCH, HEADS, 64, dim, dtype=dtype) for _ in range(2))
    return kernel.launch(k, v, members, sizes, None, *means)


def vote(dim: int, dtype: torch.dtype = HALF, voters: int = 4) -> Any:
    """Votes of 64 tiles of ``voters`` voters for 4,097 keys."""
    from sparsiattn.kernels._triton import score

    q, k, _ = operands(4096, dim, dtype)
    order = empty(64 * voters, 64 // voters, dtype=torch.int64)
    votes = empty(BATCH, HEADS, 64, 4112, dtype=torch.float32)
    return score.vote_launch(q, k, order, order[:, 0], votes, PREFIX, dim**-0.5)


def rank(n: int) -> Any:
    """Lists of a tenth of ``n`` patch keys, and the counts of 64 cells."""
    from sparsiattn.kernels._triton import score

    tiles, columns = n // 64, -(-(n + PREFIX) // 16) * 16
    votes = empty(BATCH, HEADS, tiles, columns, dtype=torch.float32)
    index = empty(BATCH, HEADS, tiles, n // 10, dtype=torch.int64)
    cells = empty(n + PREFIX, dtype=torch.int64)
    bias = empty(BATCH, HEADS, tiles, 64, dtype=torch.float32)
    total = empty(65, dtype=torch.float32)
    return score.rank_launch(votes, index, PREFIX, n + PREFIX, cells, total, bias)


FLOAT = torch.float32
PROGRAMS: dict[str, Callable[[], Any]] = {
    **{f"attention D={d} bf16": partial(attention, d) for d in (64, 72, 80, 128, 256)},
    "attention D=64 bf16, tiles of 32": partial(attention, 64, tile=32),
    "attention D=64 fp32": partial(attention, 64, FLOAT),
    "attention backward D=64 bf16": partial(attention, 64, backward=True),
    "attention backward D=80 bf16": partial(attention, 80, backward=True),
    "gradients of queries D=64 bf16": partial(query_gradients, 64),
    **{f"gradients of keys D={d} bf16": partial(key_gradients, d) for d in (64, 80, 128, 256)},
    "gradients of keys D=64 fp32": partial(key_gradients, 64, FLOAT),
    "gradients of summary keys D=64 bf16": partial(key_gradients, 64, summary=True),
    "pool D=64 bf16": partial(pool, 64),
    "pool D=64 fp32": partial(pool, 64, FLOAT),
    "pool D=256 bf16": partial(pool, 256),
    **{f"vote D={d} bf16": partial(vote, d) for d in (64, 80, 128, 256)},
    "vote D=64 bf16, 8 voters": partial(vote, 64, voters=8),
    "vote D=64 fp32": partial(vote, 64, FLOAT),
    **{f"rank {n} keys": partial(rank, n) for n in (1024, 4096, 16384)},
}


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spilled_bytes": r"(\d+) bytes spill stores",
    "stack_bytes": r"(\d+) bytes stack frame",
}


def resources(launch: Any, capability: int) -> dict[str, int]:
    """What one program of a launch takes of a GPU, as ptxas reports it.

    Returns:
        ``warps``; of every thread ``registers``, ``spilled_bytes`` (stored to memory because there
        are too few registers) and ``stack_bytes``; and ``shared_bytes`` of a program.
    """
    from sparsiattn.kernels._triton.offline import compiled

    binary = compiled(launch, capability)
    report = ptxas_report(binary.asm["ptx"], capability)
    found = {name: re.search(pattern, report) for name, pattern in PATTERNS.items()}
    numbers = {name: int(match[1]) if match else 0 for name, match in found.items()}
    return {"warps": launch.warps, **numbers, "shared_bytes": int(binary.metadata.shared)}


def ptxas_report(ptx: str, capability: int) -> str:
    """What the ptxas of triton prints about a program, compiled as triton does."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            get_ptxas(capability).path, "-v", "-lineinfo", "--regAllocOptLevel=2",
            f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder, "kernel.cubin")),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ptxas failed: {run.stderr}")
    return run.stderr + run.stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="name of one program", choices=PROGRAMS)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = [options.only] if options.only else list(PROGRAMS)
    file = options.out / "triton-registers.json"
    found = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = {(row["program"], row["sm"]): row for row in found}
    about = {**machine(), "triton": _triton_version()}
    for name in names:
        for capability in options.capability:
            row = {"program": name, "sm": capability, **resources(PROGRAMS[name](), capability)}
            print(json.dumps(row), flush=True)
            rows[name, capability] = row
            content = {"machine": about, "rows": [rows[at] for at in sorted(rows)]}
            file.write_text(json.dumps(content, indent=2) + "\n")


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    main()
