"""Kernels on a GPU in bfloat16, beside every backend of torch's attention, row by row.

    python benchmarks/gpu_kernels.py [--set forward|sizes|backward|ragged|flex] [--out DIR]

Each row has the median time of `triton.testing.do_bench`, launched from Python and replayed from a
CUDA graph. Sparse rows include planning, unless their name says "alone".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from gpu_device import Rows, arguments, measured, placed, random, session
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsiattn import AttentionInputs, Pattern, Site
from sparsiattn.attention import Lengths
from sparsiattn.kernels import refusals
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import Connectivity, finish

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DIM = 64


@dataclass(frozen=True)
class Case:
    """One attention call: patches of a square grid, and a class token."""

    tokens: int
    batch: int
    heads: int
    k: float
    tile: tuple[int, int] = (8, 8)

    def __str__(self) -> str:
        shape = f"N={self.tokens} B={self.batch} H={self.heads}"
        return f"{shape} k={self.k} tile={self.tile[0]}x{self.tile[1]}"


CASES = (
    Case(4096, 8, 6, 0.1),
    Case(4096, 8, 6, 0.25),
    Case(16384, 1, 12, 0.1),
    Case(16384, 1, 12, 0.25),
    Case(1024, 8, 6, 0.25),
    Case(1024, 8, 6, 0.1),
    Case(4096, 8, 6, 0.1, (16, 8)),
    Case(4096, 8, 6, 0.1, (16, 16)),
)
"""The goals first."""

IN_BLOCKS: dict[str, Any] = {"scores": "predictor", "block": (8, 8)}
"""Options for kernels that take lists of key blocks: 64 keys each."""


def operands(case: Case, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of one packed projection, as hosts have them."""
    packed = random(case.batch, case.tokens + 1, 3, case.heads, DIM).requires_grad_(grad)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return q, k, v


def planned(
    case: Case, qkv: tuple[Tensor, Tensor, Tensor], **options: Any
) -> tuple[AttentionInputs, Callable[[], Pattern]]:
    """The inputs of a call, and what plans it."""
    site = Site.of(*qkv, prefix_tokens=1)
    strategy = Connectivity(k=case.k, tile=case.tile, **options)
    block = strategy.block_for(site.keys, case.tile)
    inputs = AttentionInputs(*qkv, DIM**-0.5, None, site, tile=case.tile, block=block)
    planner: Any = placed(strategy.planner(site))
    background = strategy.background_for(inputs.key_grid, inputs.key_views)
    return inputs, lambda: finish(planner(inputs), inputs, background=background)


def dense(case: Case, backend: str, *, grad: bool = False) -> dict[str, Any]:
    """One backend of torch's attention, with the backward pass if ``grad``."""
    q, k, v = operands(case, grad=grad)

    def call() -> Any:
        with sdpa_kernel(BACKENDS[backend]):
            return with_backward(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

    return measured(call, graph=not grad)


def with_backward(out: Tensor, leaves: Sequence[Tensor], grad: bool) -> Any:
    """Gradients of the operands, or the result itself."""
    return torch.autograd.grad(out, leaves, torch.ones_like(out)) if grad else out


def planning(case: Case) -> dict[str, Any]:
    """Planning alone."""
    _, plan = planned(case, operands(case))
    return measured(plan)


def sparse(
    case: Case, kernel: str, *, alone: bool = False, grad: bool = False, **options: Any
) -> dict[str, Any]:
    """One kernel, with planning unless it is alone, with the backward pass if ``grad``."""
    qkv = operands(case, grad=grad)
    inputs, plan = planned(case, qkv, **options)
    run, pattern = REGISTRY.get("kernels", kernel), plan()
    reasons = refusals(run, inputs, pattern)
    if reasons:
        return {"refused": "; ".join(reasons)}
    if kernel == "flex":
        run.warmup(inputs, pattern)
    row = measured(
        lambda: with_backward(run(inputs, pattern if alone else plan()), qkv, grad),
        graph=not grad,
    )
    return {**row, "expected": round(run.speed(inputs, pattern), 2)}


def packed(kernel: str, side: int) -> dict[str, Any]:
    """32 images of ``side`` x ``side`` patches at most in one row, each a whole or a part."""
    whole = side * side
    lengths = tuple(whole * (8 + i % 8) // 16 for i in range(32))
    if kernel == "padded":
        q = random(32, 6, whole, DIM)
        return measured(lambda: F.scaled_dot_product_attention(q, q, q))
    total = sum(lengths)
    q, k, v = random(3, 1, total, 6, DIM).transpose(2, 3).unbind(0)
    inputs = AttentionInputs(q, k, v, DIM**-0.5, None, Site.of(q, k, v))
    pattern, run = Lengths(total, total, lengths), REGISTRY.get("kernels", kernel)
    reasons = refusals(run, inputs, pattern)
    if reasons:
        return {"refused": "; ".join(reasons)}
    return measured(lambda: run(inputs, pattern))


def with_sizes(case: Case, warps: int, stages: int) -> dict[str, Any]:
    """The Triton kernel with another number of warps and of stages."""
    from sparsiattn.kernels._triton import launch

    usual = launch.forward_sizes

    def sizes(call: Any) -> Any:
        return replace(usual(call), warps=warps, stages=stages)

    with mock.patch.object(launch, "forward_sizes", sizes):
        return sparse(case, "triton", alone=True)


Row = tuple[str, Callable[[], dict[str, Any]]]


def forward_rows() -> Iterator[Row]:
    for case in CASES:
        for backend in BACKENDS:
            yield f"{case} | dense {backend}", partial(dense, case, backend)
        yield f"{case} | triton", partial(sparse, case, "triton")
        yield f"{case} | triton alone", partial(sparse, case, "triton", alone=True)
        yield f"{case} | planning alone", partial(planning, case)
        yield f"{case} | xformers", partial(sparse, case, "xformers", **IN_BLOCKS)
        blocks = partial(sparse, case, "triton", **IN_BLOCKS)
        yield f"{case} | triton, blocks of 8x8", blocks
        yield f"{case} | gather", partial(sparse, case, "gather")


def flex_rows() -> Iterator[Row]:
    for case in CASES[:4]:
        yield f"{case} | flex", partial(sparse, case, "flex", **IN_BLOCKS)


def sizes_rows() -> Iterator[Row]:
    for case, warps, stages in product((CASES[0], CASES[6]), (4, 8), (2, 3, 4)):
        name = f"{case} | triton alone, {warps} warps, {stages} stages"
        yield name, partial(with_sizes, case, warps, stages)


def backward_rows() -> Iterator[Row]:
    for case in CASES[:2]:
        for backend in BACKENDS:
            name = f"{case} | training, dense {backend}"
            yield name, partial(dense, case, backend, grad=True)
        yield f"{case} | training, triton", partial(sparse, case, "triton", grad=True)


def ragged_rows() -> Iterator[Row]:
    for side, kernel in product((14, 24), ("padded", "varlen", "xformers", "sdpa")):
        name = f"32 images up to {16 * side} px | ragged, {kernel}"
        yield name, partial(packed, kernel, side)


SETS: dict[str, Callable[[], Iterator[Row]]] = {
    "forward": forward_rows,
    "backward": backward_rows,
    "ragged": ragged_rows,
    "sizes": sizes_rows,
    "flex": flex_rows,
}


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--set", choices=SETS, default="forward")
    options = parser.parse_args(given)
    path = options.out / f"kernels-{options.set}.jsonl"
    rows = Rows(path, fake=options.fake, resume=options.resume)
    grad = torch.enable_grad() if options.set == "backward" else torch.no_grad()
    with session(options.fake), grad:
        for name, make in SETS[options.set]():
            rows.add(name, make)
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
