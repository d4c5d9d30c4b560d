"""Torch's counter of FLOPs, taught this library's operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsiattn.kernels.native.ops import FLOP_FORMULAS
from sparsiattn.patching.discovery.meta_cache import recalling


class _Untracked:
    """In the place of torch's tracker of modules, of which only totals are needed.

    The tracker hooks every module's tensors, and fails on views of parameters made without
    gradients.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def flop_counter() -> Any:
    """Torch's counter of FLOPs, two for each multiply-accumulate, without its tracker."""
    from torch.utils import flop_counter as torch_counter  # imports triton: only when needed

    formulas: dict[Any, Any] = dict(FLOP_FORMULAS)
    for name in ("linear_dynamic", "linear_dynamic_fp16"):  # weights that are no tensors
        formulas[getattr(torch.ops.quantized, name)] = _linear_flops
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if fused not in torch_counter.flop_registry:  # before torch 2.11
        formulas[fused] = lambda q, k, v, *_, **__: torch_counter.sdpa_flop_count(q, k, v)
    counter: Any = torch_counter.FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _Untracked()
    return counter


def _linear_flops(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * math.prod(x) * out_shape[-1])


@contextmanager
def mac_counter() -> Iterator[Any]:
    """A `flop_counter` at work, for tensors that are most often without data."""
    with recalling(), flop_counter() as counter:
        yield counter


def macs_of(counter: Any) -> int:
    """Multiply-accumulates that a counter saw; 0 without a counter."""
    return 0 if counter is None else int(counter.get_total_flops()) // 2
