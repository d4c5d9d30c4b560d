"""Gradients of the compiled kernel, against those of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsiattn
from sparsiattn import AttentionInputs, Kernel, Pattern
from sparsiattn.attention import CountedSummary, KeyLists, TopLogits
from sparsiattn.kernels import Native, Reference
from sparsiattn.strategies import finish
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support.host_masks import HALVES, KINDS, Case
from tests.support.native_calls import call

pytestmark = pytest.mark.usefixtures("compiled_native")


def gradients(
    kernel: Kernel, inputs: AttentionInputs, pattern: Pattern, grad: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    trained = inputs.replace(q=q, k=k, v=v)
    assert kernel.why_not(trained, pattern) == []
    out = kernel(trained, pattern)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def agree(inputs: AttentionInputs, pattern: Pattern) -> None:
    grad = torch.randn(*inputs.q.shape[:3], inputs.v.shape[-1]).to(inputs.q.dtype)
    found = gradients(Native(), inputs, pattern, grad)
    exact = gradients(Reference(), inputs, pattern, grad)
    share = 1e-4 if inputs.q.dtype == torch.float32 else 2e-2
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == inputs.q.dtype
        largest = other.float().abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=share * largest)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.builds(
        Case,
        grid=st.tuples(st.integers(1, 10), st.integers(2, 10)),
        prefix=st.integers(0, 3) | st.sampled_from([9]),
        dims=st.tuples(st.sampled_from([1, 13, 16, 72, 100]), st.sampled_from([4, 11, 64, 80])),
        kind=st.sampled_from(KINDS),
        lead=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 3])),
        dtype=st.sampled_from([torch.float32, torch.float32, *HALVES]),
        seed=st.integers(0, 999),
    ),
    tile=st.sampled_from([1, (1, 2), (2, 2), (4, 4), (5, 3), (9, 9)]),
    block=st.sampled_from([1, (2, 2), (4, 3)]),
    k=st.floats(0.05, 0.95),
    background=st.sampled_from([None, 1, 3]),
)
def test_equal_those_of_the_reference(
    case: Case, tile: object, block: object, k: float, background: int | None
) -> None:
    inputs = case.inputs(tile=tile, block=block)
    scores = torch.rand(2, 3, inputs.n_keys, inputs.n_keys)
    pattern = finish(Pattern.top(scores, k), inputs, background=background)
    assume(isinstance(pattern, KeyLists))
    if pattern.summary is not None and pattern.summary.per_query:
        pattern = replace(pattern, summary=None)  # type: ignore[type-var]
    agree(inputs, pattern)


def test_lists_that_were_planned_without_a_gradient() -> None:
    inputs = Case((6, 6), 1, (16, 16), "bias", (2, 3), torch.float32, 0).inputs()
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, 0.2), inputs, background=2)
    agree(inputs, pattern)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_shared_lists(threads: int) -> None:
    before = torch.get_num_threads()
    inputs, pattern = call((16, 17), (8, 8), 1)
    try:
        torch.set_num_threads(threads)
        agree(inputs, replace(pattern, index=pattern.index[:1, :1], summary=None))  # type: ignore[attr-defined, call-arg, type-var]
        agree(inputs, pattern)
    finally:
        torch.set_num_threads(before)


def test_counts_are_not_made_for_a_training_step() -> None:
    inputs, pattern = call((8, 8), (4, 4), (2, 2))
    gradients(Native(), inputs, pattern, torch.ones_like(inputs.v))
    assert isinstance(pattern.summary, CountedSummary)
    assert "bias" not in vars(pattern.summary)


def test_second_derivatives_are_those_of_the_reference() -> None:
    inputs, pattern = call((4, 4), (2, 2), 1)

    def twice(kernel: Kernel) -> Tensor:
        q = inputs.q.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(
            kernel(inputs.replace(q=q), pattern).square().sum(), q, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), q)[0]

    torch.testing.assert_close(twice(Native()), twice(Reference()), rtol=1e-3, atol=1e-5)


def test_a_model_trains() -> None:
    model, images = tiny_vit(), tiny_images(2)
    found = []
    for kernel in ("native", "reference"):
        model.zero_grad()
        with sparsiattn.patch(model, "connectivity", k=0.3, tile=(2, 2), kernel=kernel):
            model(images).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
