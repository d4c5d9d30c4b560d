"""torch's FLOP counter, with formulas for this library's operators."""

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
    """Replaces torch's module tracker, since only totals are needed.

    The tracker hooks the tensors of every module, and fails on views of parameters that were made
    without gradients.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def flop_counter() -> Any:
    """torch's FLOP counter without its module tracker; it counts two FLOPs per MAC."""
    from torch.utils import flop_counter as torch_counter  # imports triton: only when needed

    formulas: dict[Any, Any] = dict(FLOP_FORMULAS)
    for name in ("linear_dynamic", "linear_dynamic_fp16"):  # their packed weights are not tensors
        formulas[getattr(torch.ops.quantized, name)] = _linear_flops
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if fused not in torch_counter.flop_registry:  # before torch 2.11
        formulas[fused] = lambda q, k, v, *_, **__: torch_counter.sdpa_flop_count(q, k, v)
    # those that stay whole in `taken_apart`
    formulas[torch.ops.aten.linear] = _linear_flops
    formulas[torch.ops.aten.scaled_dot_product_attention] = _attention_flops
    counter: Any = torch_counter.FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _Untracked()
    return counter


def _linear_flops(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * math.prod(x) * out_shape[-1])


def _attention_flops(q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * math.prod(out_shape[:-1]) * k[-2] * (q[-1] + out_shape[-1]))


@contextmanager
def mac_counter() -> Iterator[Any]:
    """Context manager that counts MACs; `macs_of` reads the result. Mostly for meta tensors."""
    if _get_current_dispatch_mode() is not None:  # it may need to see operators that are cached
        with flop_counter() as counter:
            yield counter
        return
    with _CountMacs() as mode:
        yield mode.tally


class _CountMacs(Recalled):
    """Counts MACs and recalls results in one mode, since two would double every operator's time."""

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
    """Counts like `flop_counter`, but operators are passed to it by another dispatch mode.

    A separate dispatch mode would slow down every operator of a trace.

    Attributes:
        macs: Multiply-accumulates so far; None after an operator that torch cannot count, if this
            is not strict.

    Args:
        strict: Whether an operator that torch cannot count raises.
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
        # including the result, since packed weights are not tensors and have no shape
        shapes = (x.shape if isinstance(x, Tensor) else str(x) for x in (*args, out))
        key = (func, *shapes) if isinstance(out, Tensor) and not kwargs else None
        macs = self._known.get(key)
        if macs is None:
            try:
                macs = int(formula(*args, **kwargs, out_val=out)) // 2
            except Exception:  # for example grouped heads in older versions
                if self._strict:
                    raise
                self.macs = None
                return
            if key is not None:
                self._known[key] = macs
        self.macs += macs

    def clear(self) -> None:
        """Start again from 0."""
        self.macs = 0


def macs_of(counter: Any) -> int:
    """Multiply-accumulates that a counter has counted; 0 without a counter."""
    if isinstance(counter, MacTally):
        return counter.macs or 0
    return 0 if counter is None else int(counter.get_total_flops()) // 2
