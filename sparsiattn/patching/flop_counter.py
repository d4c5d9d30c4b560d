"""Torch's counter of FLOPs, taught this library's operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sparsiattn.kernels.native.ops import FLOP_FORMULAS
from sparsiattn.patching.discovery.meta_cache import Recalled, taken_apart


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
    """A counter at work, for `macs_of` and tensors that are most often without data."""
    if _get_current_dispatch_mode() is not None:  # which may read what would be recalled
        with flop_counter() as counter:
            yield counter
        return
    with _CountMacs() as mode:
        yield mode.tally


class _CountMacs(Recalled):
    """Counts and recalls: two modes would cost every operator twice the time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = MacTally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = taken_apart(self, func, args, kwargs)
        if out is NotImplemented:
            out = self.answer(func, args, kwargs)
            self.tally(func, args, kwargs, out)
        return out


class MacTally:
    """Adds up what a `flop_counter` would count, of operators that a mode of ours shows it.

    A mode of its own would cost every operator of a trace some time.

    Attributes:
        macs: Multiply-accumulates so far; None once an operator came that torch cannot count, where
            that is no error.

    Args:
        strict: Whether it is.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self.macs: int | None = 0
        self._strict = strict
        self._formulas = flop_counter().flop_registry
        self._known: dict[Any, int] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count one operator."""
        formula = self._formulas.get(func.overloadpacket)
        if formula is None or self.macs is None:
            return
        # with the result: packed weights, which are no tensors, say nothing of their shape
        shapes = (x.shape if isinstance(x, Tensor) else str(x) for x in (*args, out))
        key = (func, *shapes) if isinstance(out, Tensor) and not kwargs else None
        macs = self._known.get(key)
        if macs is None:
            try:
                macs = int(formula(*args, **kwargs, out_val=out)) // 2
            except Exception:  # grouped heads, say, in older versions
                if self._strict:
                    raise
                self.macs = None
                return
            if key is not None:
                self._known[key] = macs
        self.macs += macs

    def clear(self) -> None:
        """Start again."""
        self.macs = 0


def macs_of(counter: Any) -> int:
    """Multiply-accumulates that a counter saw; 0 without a counter."""
    if isinstance(counter, MacTally):
        return counter.macs or 0
    return 0 if counter is None else int(counter.get_total_flops()) // 2
