"""`KernelSuite`: tests that every kernel must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import AttentionInputs, ComputedPattern, Lengths, Pattern
from sparsiattn.errors import KernelRefused, SparsiattnError
from sparsiattn.kernels import Kernel, Reference, refusals
from sparsiattn.patching import patch_quietly, unpatch
from sparsiattn.strategies import TopK, finish
from sparsiattn.testing.hosts import random_inputs, tiny_images, tiny_vit
from sparsiattn.testing.plugin import registered

Case = tuple[str, AttentionInputs, Pattern]

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[Case]:
    """Calls of every layout: uneven tiles, prefixes, masks, background."""
    scores = torch.randn(2, 3, 21, 21, generator=torch.Generator().manual_seed(3)).to(device)
    tiles: tuple[int | tuple[int, int], ...] = (1, (2, 2), (3, 3))
    for tile, background, host in product(tiles, (None, 2), ("none", "bias", "keys", "mask")):
        inputs = random_inputs((4, 5), tile=tile, dtype=dtype, value_dim=6)
        inputs = _on(_with_host(inputs, host), device)
        name = f"top tile={tile} background={background} host={host}"
        yield name, inputs, finish(Pattern.top(scores, 6), inputs, background=background)
        if tile == 1:
            mask = finish(Pattern.mask(scores > 0.5), inputs, background=background)
            yield f"mask {name}", inputs, mask
    yield from _blocks(dtype, device)
    yield "dense", inputs, Pattern.dense(21, 21)
    yield from _derived(dtype, device)
    for value_dim in (6, 8):
        packed = _on(random_inputs((4, 5), dtype=dtype, value_dim=value_dim), device)
        yield f"lengths v={value_dim}", packed, Lengths(21, 21, (4, 9, 4, 4))


def _blocks(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Lists of key blocks, of equal and of different sizes, with full and partial last blocks."""
    budgets = ((1, 9), (0, 8), (2, 13))
    for grid, (prefix, k), background in product(((4, 6), (4, 5)), budgets, (None, 2)):
        inputs = random_inputs(grid, prefix=prefix, tile=(2, 3), block=(2, 2), dtype=dtype)
        inputs = _on(inputs, device)
        n = inputs.n_keys
        scores = torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(6)).to(device)
        name = f"blocks of {grid} prefix={prefix} k={k} background={background}"
        yield name, inputs, finish(Pattern.top(scores, k), inputs, background=background)


def _derived(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Plans that select no keys: computed keys, given logits, a given output."""
    for host in ("none", "bias", "mask"):
        inputs = _on(_with_host(random_inputs((4, 5), dtype=dtype, value_dim=6), host), device)
        k, v, logits = inputs.k[..., ::4, :], inputs.v[..., ::4, :], inputs.k @ inputs.q.mT
        bias = inputs.biased(logits)[..., 1:, ::4]
        yield f"computed host={host}", inputs, Pattern.computed_keys(inputs, k, v, bias=bias)
        narrow = inputs.patch_queries[..., :3]
        yield f"narrow host={host}", inputs, Pattern.computed_keys(inputs, k[..., :3], v, q=narrow)
        yield f"logits host={host}", inputs, Pattern.logits(inputs, logits)
        yield f"output host={host}", inputs, Pattern.output(inputs, inputs.v)


def _map_operands(
    inputs: AttentionInputs, change: Callable[[Tensor], Tensor], bias: bool = False
) -> AttentionInputs:
    """The same call with queries, keys and values changed, and the bias if there is one."""
    names = ["q", "k", "v"] + ["bias"] * (bias and inputs.bias is not None)
    return inputs.replace(**{name: change(getattr(inputs, name)) for name in names})


def _on(inputs: AttentionInputs, device: str) -> AttentionInputs:
    return _map_operands(inputs, lambda x: x.to(device), bias=True)


def _with_host(inputs: AttentionInputs, host: str) -> AttentionInputs:
    """Inputs with one kind of host mask."""
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
    """Tests of a kernel: subclass it, set ``kernel`` (and ``dtypes``, ``device``), and run pytest.

    Attributes:
        kernel: The kernel to test.
        device: Device of the calls.
        dtypes: Data types of the calls.
        tolerance: Tolerance of the comparison with the reference in float32, by data type.
        unready: Number of calls to test that the kernel supports but is not ready for, as it would
            compile for each of them.
    """

    kernel: Kernel
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    tolerance: dict[torch.dtype, dict[str, Any]] = TOLERANCE
    unready: int = 1

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        """The calls to test; override it for a kernel with other shapes or slow first calls."""
        yield from cases(dtype, self.device)

    def _runnable(self, dtype: torch.dtype) -> Iterator[Case]:
        """The cases that the kernel supports, with at most `unready` that it must compile for."""
        unready = self.unready
        for name, inputs, pattern in self.cases(dtype):
            if refusals(self.kernel, inputs, pattern):
                continue
            if self.kernel.not_ready(inputs, pattern):
                unready -= 1
                if unready < 0:
                    continue
            yield name, inputs, pattern

    def test_runs_something(self) -> None:
        assert self.kernel.why_unavailable() or any(True for _ in self._runnable(self.dtypes[0]))

    def test_refusals_are_reasons(self) -> None:
        for name, inputs, pattern in cases(device=self.device):
            if isinstance(pattern, ComputedPattern) and not self.kernel.supports_computed:
                continue  # the kernel never gets these
            reasons = self.kernel.why_not(inputs, pattern)
            assert isinstance(reasons, list), name
            assert all(isinstance(reason, str) and reason for reason in reasons), name

    def test_why_not_never_raises(self) -> None:
        """Law 3, for unusual calls: `why_not` returns a list."""
        for name, inputs, pattern in _odd(self.device):
            assert isinstance(self.kernel.why_not(inputs, pattern), list), name

    def test_says_what_it_is(self) -> None:
        described = self.kernel.summary or (type(self.kernel).__doc__ or "").strip()
        assert self.kernel.name
        assert described, "give it a summary"
        assert all(isinstance(reason, str) and reason for reason in self.kernel.why_unavailable())

    def test_speed_is_a_figure(self) -> None:
        """It is computed from shapes only, without values."""
        for name, inputs, pattern in self._runnable(self.dtypes[0]):
            speed = self.kernel.speed(inputs, pattern)
            assert isinstance(speed, float), name
            assert 0 <= speed < float("inf"), name
            macs = self.kernel.uncounted_macs(inputs, pattern)
            assert macs is None or macs >= 0, name

    def test_operands_stay_as_they_are(self) -> None:
        """Nothing is written in place, and operands may be views."""
        for name, inputs, pattern in self._runnable(self.dtypes[0]):
            call = _as_views(inputs)
            if refusals(self.kernel, call, pattern):
                continue
            before = _map_operands(call, Tensor.clone)
            out = self.kernel(call, pattern)
            self._assert_close(out, self.kernel(inputs, pattern), name)
            for operand in ("q", "k", "v"):
                assert torch.equal(getattr(call, operand), getattr(before, operand)), name

    def test_in_a_model_it_runs_or_says_why_not(self) -> None:
        """Selected by name it has no fallback: it equals the reference, or is refused."""
        model, x = tiny_vit().to(self.device), tiny_images().to(self.device)
        outputs = []
        with torch.no_grad():
            for name in ("reference", self.kernel.name):
                with registered("kernels", self.kernel):
                    try:
                        patched = patch_quietly(model, TopK(k=0.25, tile=(2, 2)), kernel=name)
                        outputs.append(model(x))
                    except KernelRefused as refused:
                        assert name in str(refused)  # noqa: PT017 - a refusal is one of two answers
                        unpatch(model)
                        return
                    assert {row.kernel for row in patched.report().sites} == {name}
                    patched.unpatch()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)

    def _assert_close(
        self, out: Tensor, exact: Tensor, name: str, dtype: torch.dtype | None = None
    ) -> None:
        tolerance = self.tolerance[dtype or self.dtypes[0]]
        torch.testing.assert_close(out, exact, msg=f"{name}: {{}}".format, **tolerance)

    def test_equals_the_reference(self) -> None:
        for dtype in self.dtypes:
            for name, inputs, pattern in self._runnable(dtype):
                exact = Reference()(_map_operands(inputs, Tensor.float), pattern)
                out = self.kernel(inputs, pattern)
                assert out.dtype == dtype, name
                self._assert_close(out.float(), exact, f"{name}, {dtype}", dtype)

    def test_gradients_equal_the_reference(self) -> None:
        if not self.kernel.differentiable:
            return
        for name, inputs, pattern in self._runnable(torch.float32):
            if refusals(self.kernel, _with_leaves(inputs), pattern):
                continue  # the kernel supports only the forward pass here
            ours = _gradients(self.kernel, inputs, pattern)
            exact = _gradients(Reference(), inputs, pattern)
            message = f"{name}: {{}}".format
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4, msg=message)

    def test_second_derivatives_equal_the_reference(self) -> None:
        """Or they are refused: a backward pass that cannot be differentiated must raise.

        `torch.autograd.grad` silently skips nodes that lead to no input.
        """
        if not self.kernel.differentiable:
            return
        for name, inputs, pattern in self._runnable(torch.float32):
            if refusals(self.kernel, _with_leaves(inputs), pattern):
                continue  # the kernel supports only the forward pass here
            exact = _second_derivatives(Reference(), inputs, pattern)
            try:
                ours = _second_derivatives(self.kernel, inputs, pattern)
            except SparsiattnError:
                continue
            message = f"{name}: {{}}".format
            torch.testing.assert_close(ours, exact, rtol=1e-2, atol=1e-3, msg=message)

    def test_a_row_without_a_key_is_zero(self) -> None:
        inputs = _on(random_inputs((4, 4), prefix=0), self.device)
        keep = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(5)) > 0.5
        keep[..., 3, :] = False
        pattern = Pattern.mask(keep.to(self.device))
        if not refusals(self.kernel, inputs, pattern):
            out = self.kernel(inputs, pattern)
            assert (out[..., 3, :] == 0).all()
            assert torch.isfinite(out).all()


def _odd(device: str) -> Iterator[Case]:
    """Valid but unusual calls."""
    inputs = _on(random_inputs((4, 4)), device)
    scores = torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(7)).to(device)
    pattern = finish(Pattern.top(scores, 5), inputs)
    yield "torch.float64", _map_operands(inputs, Tensor.double), pattern
    yield "torch.float16", _map_operands(inputs, Tensor.half), pattern
    yield "dropout", inputs.replace(dropout=0.1), pattern
    yield "meta tensors", _map_operands(inputs, lambda x: x.to("meta")), pattern
    yield "no image", _map_operands(inputs, lambda x: x[:0]), Pattern.dense(17, 17)
    fewer = inputs.replace(k=inputs.k[:, :, :9], v=inputs.v[:, :, :9])
    yield "fewer keys than queries", fewer, Pattern.dense(17, 9)


def _as_views(inputs: AttentionInputs) -> AttentionInputs:
    """The same call with operands stored as ``[B, N, H, D]``, as in most hosts."""
    return _map_operands(inputs, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))


def _with_leaves(inputs: AttentionInputs) -> AttentionInputs:
    """The same call with operands that require a gradient."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.is_floating_point())

    return _map_operands(inputs, leaf, bias=True)


def _gradients(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> tuple[Tensor, ...]:
    call = _with_leaves(inputs)
    out = kernel(call, pattern)
    if not out.requires_grad:  # the plan contains the output
        return ()
    return _of_leaves((out * _weights(out)).sum(), call)


def _second_derivatives(
    kernel: Kernel, inputs: AttentionInputs, pattern: Pattern
) -> tuple[Tensor, ...]:
    """The gradient of a penalty on the gradient."""
    call = _with_leaves(inputs)
    out = kernel(call, pattern)
    if not out.requires_grad:
        return ()
    grads = _of_leaves((out.square() * _weights(out)).sum(), call, create_graph=True)
    penalty = sum((grad * _weights(grad)).sum() for grad in grads)
    return _of_leaves(penalty, call) if isinstance(penalty, Tensor) else ()


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)


def _of_leaves(
    total: Tensor, call: AttentionInputs, create_graph: bool = False
) -> tuple[Tensor, ...]:
    operands = (call.q, call.k, call.v, call.bias)
    leaves = [x for x in operands if x is not None and x.requires_grad]
    return torch.autograd.grad(
        total, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
