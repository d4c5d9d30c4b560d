"""What CUDA graphs need of a patched model, seen on tensors that only claim to be on a GPU.

A graph records the addresses of all tensors. So after the first call (`Patch.warmup`), a call must
neither make tables nor copy anything from the CPU, and it must launch the same kernels every time.
"""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn.attention import geometry
from sparsiattn.testing import tiny_vit
from tests.support.launches import Launches, counted, fake_gpu, on_gpu

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "votes": ("connectivity", {"tile": (4, 4)}),
    "a list for every query": ("connectivity", {}),
    "predictor": ("connectivity", {"tile": (4, 4), "scores": "predictor"}),
    "blocks": ("connectivity", {"tile": (4, 4), "scores": "predictor", "block": (2, 2)}),
    "local": ("local", {"tile": (4, 4)}),
    "topk": ("topk", {"tile": (4, 4), "background": 2}),
    "random": ("random", {}),
}


def calls(name: str, *, with_triton: bool) -> list[tuple[Launches, dict[Any, Any]]]:
    """Three calls of a patched model, each with the tables that are cached after it."""
    strategy, options = STRATEGIES[name]
    model: nn.Module = tiny_vit().eval()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        sparsiattn.patch(model, strategy, k=0.3, kernel="triton", **options)
    found = []
    with fake_gpu(with_triton=with_triton):
        on_gpu(model)
        images = torch.empty(2, 3, 32, 32, device="cuda")
        for _ in range(3):
            with counted() as launches:
                model(images)
            found.append((launches, dict(geometry._TABLES)))
    return found


@pytest.mark.parametrize(
    ("name", "with_triton"), [*((name, True) for name in STRATEGIES), ("votes", False)]
)
def test_only_the_first_call_makes_tables(name: str, with_triton: bool) -> None:
    first, second, third = calls(name, with_triton=with_triton)
    assert first[1], "the first call makes tables"
    for launches, tables in (second, third):
        assert launches.copied_to_device == []
        assert tables.keys() == first[1].keys()
        assert all(table is first[1][key] for key, table in tables.items())
    assert second[0].names == third[0].names
    assert len(second[0].names) < len(first[0].names)
