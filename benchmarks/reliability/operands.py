"""Calls of attention and patterns as hypothesis draws them, and what kernels make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from reliability.calls import same_as_reference
from reliability.drawn import shares
from reliability.hosts import DTYPES
from reliability.outcomes import Tally, Wrong
from sparsiattn.attention import AttentionInputs, Pattern, Site
from sparsiattn.errors import SparsiattnError
from sparsiattn.kernels import refusals
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import finish

SIDES = ((1, 1), (1, 2), (2, 2), (3, 2), (1, 7), (4, 4), (2, 8))
BIASES = ("none", "none", "bool", "bool by image", "added", "added with -inf", "masks -100")
MADE = ("contiguous", "from [B, N, H, D]", "packed qkv", "expanded heads", "every second column")


@dataclass(frozen=True)
class Call:
    """One call and a pattern for it."""

    kernel: str
    grid: tuple[int, int]
    prefix: int
    batch: int
    heads: int
    dim: int
    value_dim: int
    dtype: str
    layout: str
    bias: str
    tile: Any
    block: Any
    pattern: str
    k: Any
    prefix_keys: bool
    background: int | None
    scale: float
    seed: int


TILES = st.sampled_from([1, (2, 2), (1, 2), (4, 4)])
BUDGETS = st.one_of(st.floats(0.01, 0.7), st.integers(1, 9), shares())


@st.composite
def calls(draw: Any) -> Call:
    """``native`` mostly gets what it takes: single precision, key lists, no mask."""
    kernel = draw(st.sampled_from(["gather", "native", "sdpa"]))
    usual = kernel == "native" and draw(st.integers(0, 9)) > 0
    patterns = ["top"] if usual else [*["top"] * 6, "mask", "mask per head", "dense"]
    found: Call = draw(st.builds(
        Call, kernel=st.just(kernel), grid=st.sampled_from(SIDES),
        prefix=st.integers(0, 3), batch=st.sampled_from([1, 2, 3, 0]), heads=st.integers(1, 3),
        dim=st.sampled_from([8, 16, 5, 1]), value_dim=st.sampled_from([8, 16, 5, 1]),
        dtype=st.sampled_from(["fp32"] if usual else list(DTYPES)), layout=st.sampled_from(MADE),
        bias=st.sampled_from(["none"] if usual else BIASES), tile=TILES, block=TILES,
        pattern=st.sampled_from(patterns), k=BUDGETS, prefix_keys=st.booleans(),
        background=st.sampled_from([None, None, 1, 2, 3]),
        scale=st.sampled_from([1.0, 1.0, 0.0, 20.0]), seed=st.integers(0, 9999),
    ))  # fmt: skip
    return found


def judge(call: Call, tally: Tally) -> str:
    """The outcome of one call; raises where it is wrong."""
    inputs, pattern = made(call)
    try:
        pattern = finish(pattern, inputs, prefix_keys=call.prefix_keys, background=call.background)
    except SparsiattnError as error:
        return tally.documented(error)
    kernel = REGISTRY.get("kernels", call.kernel)
    before = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
    if refusals(kernel, inputs, pattern):
        return "refused: why_not"
    out = kernel(inputs, pattern)
    same_as_reference(out, inputs, pattern, call.kernel)
    if not bool(out.isfinite().all()):
        raise Wrong("NaN or infinity out of finite operands")
    operands = (inputs.q, inputs.k, inputs.v)
    if not all(torch.equal(x, old) for x, old in zip(operands, before, strict=True)):
        raise Wrong("an operand was written to")
    return f"equals the reference: {call.dtype}"


def made(call: Call) -> tuple[AttentionInputs, Pattern]:
    generator = torch.Generator().manual_seed(call.seed)
    n = call.grid[0] * call.grid[1] + call.prefix
    q, k, v = _operands(call, n, generator)
    bias, kind = _bias(call, n, generator)
    site = Site.of(
        q, k, v, prefix_tokens=call.prefix, grid=call.grid, key_grid=call.grid, bias=kind
    )
    tile, block = (1 if x == (1, 1) else x for x in (call.tile, call.block))
    inputs = AttentionInputs(
        q, k, v, call.dim**-0.5, bias, site, tile=tile, block=1 if tile == 1 else block
    )
    return inputs, _pattern(call, n, generator)


def _operands(call: Call, n: int, generator: torch.Generator) -> list[Tensor]:
    """q, k, v laid out as the call says."""
    b, h, dtype = call.batch, call.heads, DTYPES[call.dtype]

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * call.scale).to(dtype)

    if call.layout == "packed qkv" and call.dim == call.value_dim:
        return list(draw(b, n, 3, h, call.dim).permute(2, 0, 3, 1, 4))
    widths = (call.dim, call.dim, call.value_dim)
    if call.layout == "from [B, N, H, D]":
        return [draw(b, n, h, width).transpose(1, 2) for width in widths]
    if call.layout == "expanded heads":
        return [draw(b, 1, n, width).expand(b, h, n, width) for width in widths]
    if call.layout == "every second column":
        return [draw(b, h, n, 2 * width)[..., ::2] for width in widths]
    return [draw(b, h, n, width) for width in widths]


def _bias(call: Call, n: int, generator: torch.Generator) -> tuple[Tensor | None, Any]:
    if call.bias == "none":
        return None, "none"
    lead = (call.batch, 1) if call.bias == "bool by image" else (1, call.heads)
    draw = torch.randn(*lead, n, n, generator=generator)
    if call.bias.startswith("bool"):
        return draw > -0.5, "mask"  # some rows of few keys have none left
    if call.bias == "added":
        return draw.to(DTYPES[call.dtype]), "bias"
    low = -100.0 if call.bias == "masks -100" else float("-inf")
    return draw.masked_fill(draw < -0.5, low).to(DTYPES[call.dtype]), "mask"


def _pattern(call: Call, n: int, generator: torch.Generator) -> Pattern:
    if call.pattern == "dense":
        return Pattern.dense(n, n)
    if call.pattern == "top":
        scores = torch.randn(call.batch, call.heads, n, n, generator=generator)
        return Pattern.top(scores, call.k)
    lead = (1, 1) if call.pattern == "mask" else (call.batch, call.heads)
    return Pattern.mask(torch.rand(*lead, n, n, generator=generator) < 0.4)
