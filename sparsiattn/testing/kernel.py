"""The laws every kernel must keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.kernel import Kernel
from sparsiattn.kernels.reference import Reference
from sparsiattn.patterns import Lengths, Pattern
from sparsiattn.planning import finish
from sparsiattn.site import AttentionInputs
from sparsiattn.testing.hosts import random_inputs

Case = tuple[str, AttentionInputs, Pattern]

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[Case]:
    """Calls of every layout: tiles that do not divide the grid, prefixes, masks, background."""
    for tile in (1, (2, 2), (3, 3)):
        for background in (None, 2):
            for host in ("none", "bias", "keys", "mask"):
                inputs = random_inputs((4, 5), tile=tile, dtype=dtype, value_dim=6)
                inputs = _on(_with_host(inputs, host), device)
                scores = torch.randn(2, 3, 21, 21, generator=torch.Generator().manual_seed(3))
                scores = scores.to(device)
                name = f"top tile={tile} background={background} host={host}"
                yield name, inputs, finish(Pattern.top(scores, 6), inputs, background=background)
                if tile == 1:
                    drawn = Pattern.mask(scores > 0.5)
                    yield f"mask {name}", inputs, finish(drawn, inputs, background=background)
    yield from _blocks(dtype, device)
    yield "dense", inputs, Pattern.dense(21, 21)
    for value_dim in (6, 8):
        packed = _on(random_inputs((4, 5), dtype=dtype, value_dim=value_dim), device)
        yield f"lengths v={value_dim}", packed, Lengths(21, 21, (4, 9, 4, 4))


def _blocks(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Lists of key blocks: of one size and not, with and without a part of the last block."""
    for grid in ((4, 6), (4, 5)):
        for prefix, k in ((1, 9), (0, 8), (2, 13)):
            for background in (None, 2):
                inputs = random_inputs(grid, prefix=prefix, tile=(2, 3), block=(2, 2), dtype=dtype)
                inputs = _on(inputs, device)
                n = inputs.n_keys
                scores = torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(6))
                wish = Pattern.top(scores.to(device), k)
                name = f"blocks of {grid} prefix={prefix} k={k} background={background}"
                yield name, inputs, finish(wish, inputs, background=background)


def _on(inputs: AttentionInputs, device: str) -> AttentionInputs:
    q, k, v = (x.to(device) for x in (inputs.q, inputs.k, inputs.v))
    bias = None if inputs.bias is None else inputs.bias.to(device)
    return inputs.replace(q=q, k=k, v=v, bias=bias)


def _with_host(inputs: AttentionInputs, host: str) -> AttentionInputs:
    """Inputs under one kind of host mask."""
    generator = torch.Generator().manual_seed(4)
    n, bias, kind = inputs.n_keys, None, "none"
    if host == "bias":
        bias, kind = torch.randn(1, inputs.site.heads, n, n, generator=generator), "bias"
    elif host == "keys":
        bias, kind = torch.rand(inputs.q.shape[0], 1, 1, n, generator=generator) > 0.3, "mask"
    elif host == "mask":
        forbidden = torch.rand(1, 1, n, n, generator=generator) > 0.6
        bias, kind = forbidden * -100.0 * (1 - torch.eye(n)), "mask"
    return replace(inputs, bias=bias, site=replace(inputs.site, bias=kind))  # type: ignore[arg-type]


class KernelSuite:
    """Subclass it, set ``kernel`` (and ``dtypes``, ``device``), and run pytest."""

    kernel: Kernel
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        """The calls to try; override it for a kernel of other shapes, or one slow at first."""
        yield from cases(dtype, self.device)

    def _runnable(self, dtype: torch.dtype) -> Iterator[Case]:
        for name, inputs, pattern in self.cases(dtype):
            if not self.kernel.why_not(inputs, pattern):
                yield name, inputs, pattern

    def test_runs_something(self) -> None:
        assert self.kernel.unavailable() or any(True for _ in self._runnable(self.dtypes[0]))

    def test_refusals_are_reasons(self) -> None:
        for name, inputs, pattern in cases(device=self.device):
            reasons = self.kernel.why_not(inputs, pattern)
            assert isinstance(reasons, list), name
            assert all(isinstance(reason, str) and reason for reason in reasons), name

    def test_equals_the_reference(self) -> None:
        for dtype in self.dtypes:
            for name, inputs, pattern in self._runnable(dtype):
                exact = Reference()(inputs.replace(q=inputs.q.float(), k=inputs.k.float(),
                                                   v=inputs.v.float()), pattern)  # fmt: skip
                out = self.kernel(inputs, pattern)
                assert out.dtype == dtype, name
                message = f"{name}, {dtype}: {{}}".format
                torch.testing.assert_close(out.float(), exact, msg=message, **TOLERANCE[dtype])

    def test_gradients_equal_the_reference(self) -> None:
        if not self.kernel.differentiable:
            return
        for name, inputs, pattern in self._runnable(torch.float32):
            if self.kernel.why_not(_with_leaves(inputs), pattern):
                continue  # forward only here, as the kernel says
            ours, exact = (
                _gradients(kernel, inputs, pattern) for kernel in (self.kernel, Reference())
            )
            for mine, theirs in zip(ours, exact, strict=True):
                torch.testing.assert_close(
                    mine, theirs, rtol=1e-3, atol=1e-4, msg=f"{name}: {{}}".format
                )

    def test_a_row_without_a_key_is_zero(self) -> None:
        inputs = _on(random_inputs((4, 4), prefix=0), self.device)
        keep = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(5)) > 0.5
        keep[..., 3, :] = False
        pattern = Pattern.mask(keep.to(self.device))
        if not self.kernel.why_not(inputs, pattern):
            out = self.kernel(inputs, pattern)
            assert (out[..., 3, :] == 0).all()
            assert torch.isfinite(out).all()


def _with_leaves(inputs: AttentionInputs) -> AttentionInputs:
    """The same call with operands that want a gradient."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    bias = inputs.bias
    if bias is not None and bias.is_floating_point():
        bias = bias.detach().clone().requires_grad_()
    return inputs.replace(q=q, k=k, v=v, bias=bias)


def _gradients(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> tuple[Tensor, ...]:
    call = _with_leaves(inputs)
    out = kernel(call, pattern)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    operands = (call.q, call.k, call.v, call.bias)
    leaves = [x for x in operands if x is not None and x.requires_grad]
    return torch.autograd.grad((out * weight).sum(), leaves)
