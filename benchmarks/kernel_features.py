"""The feature table of docs/kernels.md: every kernel of the registry is asked, by `why_not`, what
it takes on a CPU and on a GPU. The GPU's tensors are fake, so that any machine gives one table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsiattn.attention import AttentionInputs, Lengths, Pattern, Tile
from sparsiattn.kernels import Kernel, flash, flex_compile, paged
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import Local, finish
from sparsiattn.testing import random_inputs

Call = tuple[AttentionInputs, Pattern]
SIDE, KEPT = 16, 80  # a grid of 256 patches; every query attends to 80 of them


def _call(tile: Tile = 1, block: Tile = 1, background: int | None = None, dim: int = 64) -> Call:
    inputs = random_inputs((SIDE, SIDE), prefix=0, dim=dim, heads=1, tile=tile, block=block)
    scores = torch.randn(2, 1, SIDE**2, SIDE**2, generator=torch.Generator().manual_seed(0))
    return inputs, finish(Pattern.top(scores, KEPT), inputs, background=background)


def _masked() -> Call:
    inputs = _call()[0]
    return inputs, finish(Pattern.mask(torch.eye(SIDE**2).bool()[None, None]), inputs)


def _packed(dim: int = 64) -> Call:
    inputs, _ = _call(dim=dim)
    q, k, v = (x[:1] for x in (inputs.q, inputs.k, inputs.v))
    return inputs.replace(q=q, k=k, v=v), Lengths(SIDE**2, SIDE**2, (56, 120, 80))


def _listed(background: int | None = None, dim: int = 64) -> list[Call]:
    """One of each kind of list."""
    pairs: list[tuple[Tile, Tile]] = [(1, 1), ((4, 4), 1), ((4, 4), (4, 4)), ((8, 8), (4, 4))]
    return [_call(tile, block, background, dim) for tile, block in pairs]


def _windows(dim: int = 64) -> Call:
    """Neighbourhoods of 9 x 9 patches."""
    inputs, _ = _call(dim=dim)
    return inputs, finish(Local(window=9).plan(inputs), inputs)


def _all(dim: int = 64) -> list[Call]:
    """Of every layout that some kernel is made for."""
    return [*_listed(dim=dim), _packed(dim), _windows(dim)]


def _with(**fields: object) -> list[Call]:
    """The same calls with other fields."""
    return [(replace(inputs, **fields), pattern) for inputs, pattern in _all()]  # type: ignore[arg-type]


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> list[Call]:
    """The same calls with other operands."""
    return [
        (inputs.replace(**{x: change(getattr(inputs, x)) for x in "qkv"}), pattern)
        for inputs, pattern in _all()
    ]


def _host(kind: str) -> list[Call]:
    n = SIDE**2
    bias = torch.zeros(1, 1, n, n)
    if kind == "mask":
        bias[..., 1::3] = float("-inf")
    site = replace(_call()[0].site, bias=kind)  # type: ignore[arg-type]
    return _with(bias=bias, site=site)


FEATURES: dict[str, Callable[[], list[Call]]] = {
    "keys listed for every query (`tile=1`)": lambda: [_call()],
    "keys listed for every tile": lambda: [_call((4, 4))],
    "key blocks listed for every tile": lambda: [_call((8, 8), (4, 4))],
    "windows (`local(window=...)`)": lambda: [_windows()],
    "any mask": lambda: [_masked()],
    "images of different lengths": lambda: [_packed()],
    "background keys": lambda: _listed(background=2),
    "gradients": lambda: _each(lambda x: x.requires_grad_()),
    "position bias of the model": lambda: _host("bias"),
    "mask of the model": lambda: _host("mask"),
    "dropout": lambda: _with(dropout=0.1),
    "float32": lambda: _each(lambda x: x.to(torch.float32)),
    "bfloat16, float16": lambda: _each(lambda x: x.to(torch.bfloat16)),
    "float64": lambda: _each(lambda x: x.to(torch.float64)),
    "heads of 72": lambda: _all(dim=72),
    "heads of 20": lambda: _all(dim=20),
}
_DTYPED = ("float32", "bfloat16, float16", "float64")


def _on_gpu(call: Call, dtype: torch.dtype | None) -> Call:
    """The call as it would be on a GPU; in half precision where the row does not say."""
    inputs, pattern = call
    moved = {
        x: torch.empty(
            getattr(inputs, x).shape,
            dtype=dtype or getattr(inputs, x).dtype,
            device="cuda",
            requires_grad=getattr(inputs, x).requires_grad,
        )
        for x in "qkv"
    }
    return inputs.replace(**moved), pattern


def _takes(kernel: Kernel, call: Call) -> bool:
    """What it says of the call, not of this machine."""
    if not kernel.differentiable and call[0].q.requires_grad:
        return False
    return not kernel.why_not(*call)


def _asked() -> dict[str, Kernel]:
    """Copies of the kernels that take this machine for one that has all they need."""
    found = {}
    for name, kernel in REGISTRY.all("kernels").items():
        found[name] = copy.copy(kernel)
        found[name].why_unavailable = list
    return found


@contextmanager
def _newest_libraries() -> Iterator[None]:
    """What kernels ask of this machine and of the libraries on it, answered in their favour."""
    with (
        mock.patch.object(flex_compile, "cpu_refusals", list),
        mock.patch.object(flex_compile, "adapts_block_sizes", return_value=True),
        mock.patch.object(paged, "_operator_refusals", return_value=[]),
        mock.patch.object(flash, "_capability", return_value=flash.CAPABILITY),
    ):
        yield


def table() -> tuple[list[str], list[list[str]]]:
    """Head and rows: where each kernel has each feature."""
    kernels, rows = _asked(), []
    with _newest_libraries():
        for feature, make in FEATURES.items():
            calls = make()
            dtype = None if feature in _DTYPED else torch.bfloat16
            with FakeTensorMode(allow_non_fake_inputs=True):
                gpu = [_on_gpu(call, dtype) for call in calls]
                cells = [_cell(kernel, calls, gpu) for kernel in kernels.values()]
            rows.append([feature, *cells])
    return ["", *(f"`{name}`" for name in kernels)], rows


def _cell(kernel: Kernel, cpu: list[Call], gpu: list[Call]) -> str:
    places = {"CPU": cpu, "CUDA": gpu}
    found = [p for p, calls in places.items() if any(_takes(kernel, c) for c in calls)]
    return "both" if len(found) == len(places) else "".join(found)


if __name__ == "__main__":
    head, rows = table()
    for row in [head, *rows]:
        print(" | ".join(row))
