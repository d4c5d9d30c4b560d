"""Dry runs that remember operators: nobody may be able to tell."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.patching.discovery.meta_model import meta_copy, run_dry
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.testing import tiny_vit


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Trace(TorchDispatchMode):
    """Every operator with the form of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (list, tuple)) else [out]
        self.calls.append((func, [form(x) for x in tensors if isinstance(x, torch.Tensor)]))
        return out


def form(x: torch.Tensor) -> Any:
    return type(x), x.dtype, x.device, x.shape, x.stride(), x.storage_offset()


def trace(model: Any, x: torch.Tensor, recalls: bool) -> list[Any]:
    with recalling() if recalls else nullcontext(), Trace() as found:
        run_dry(model, ((x,), {}))
    return found.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_is_seen_and_answers_as_without_memory(dtype: torch.dtype) -> None:
    meta_model = meta_copy(tiny_vit().to(dtype))
    x = meta(1, 3, 32, 32, dtype=dtype)
    plain = trace(meta_model, x, recalls=False)
    assert len(plain) > 50
    assert trace(meta_model, x, recalls=True) == plain
    assert trace(meta_model, x, recalls=True) == plain  # now from memory
    larger = meta(2, 3, 32, 32, dtype=dtype)
    assert (
        trace(meta_model, larger, recalls=True) == trace(meta_model, larger, recalls=False) != plain
    )


CALLS = {
    "scalars of three types": lambda x: [x.long() + s for s in (True, 1, 1.0)],
    "strides": lambda x: [x * 2, x.mT * 2, x[:, ::2] * 2, x.expand(5, *x.shape) * 2],
    "lists": lambda x: torch.cat([x, x + 1], dim=1),
    "several results": lambda x: [*x.topk(2), *x.sort(), *F.layer_norm(x, x.shape[-1:])],
    "views": lambda x: [x.view(-1), x.mT, *x.unbind(), x[0], x.reshape(-1, 2)],
    "nothing to do": lambda x: [F.dropout(x, 0.5, training=False), x.contiguous(), x.float()],
    "reductions": lambda x: [x.sum(), x.long().sum(), x.mean(-1, keepdim=True), x.amax((0, 1))],
    "default type": lambda x: x.long() / 2,
    "written to": lambda x: x.clone().add_(1),
    "compared": lambda x: [x > 0, torch.where(x > 0, x, 0), x.argmax(-1)],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_operator(call: Any) -> None:
    def forms() -> list[Any]:
        found = call(x)
        return [form(y) for y in (found if isinstance(found, list) else [found])]

    x = meta(2, 3, 4)
    plain = forms()
    for _ in range(2):
        with recalling():
            assert forms() == plain


def test_the_default_type_is_part_of_the_question() -> None:
    x = meta(3, dtype=torch.long)
    with recalling():
        assert (x / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (x / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_results_have_memory_of_their_own() -> None:
    x = meta(2, 3)
    with recalling():
        first, second = x + 1, x + 1
    places = {t.untyped_storage()._cdata for t in (x, first, second)}
    assert len(places) == 3


def test_what_arguments_share_stays_shared() -> None:
    x = meta(2, 3)
    with recalling():
        for _ in range(2):
            assert F.dropout(x, 0.5, training=False) is x
            assert x.view(6).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_real_tensors_are_computed() -> None:
    x = torch.arange(3.0)
    with recalling():
        assert torch.equal(x + 1, torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(x + 2, torch.tensor([2.0, 3.0, 4.0]))


def test_a_fault_is_raised_every_time() -> None:
    with recalling():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="4"):
                meta(2, 3) + meta(2, 4)


def test_inside_a_mode_that_counts_nothing_is_hidden_from_it() -> None:
    x = meta(4, 8)
    for _ in range(2):
        with mac_counter() as outer, mac_counter() as inner:
            x @ x.mT
        assert macs_of(outer) == macs_of(inner) == 4 * 8 * 4
