"""How attention is reached: hooks open a scope, a wrapper of SDPA looks into it.

`F.scaled_dot_product_attention` is replaced once, for good, by a function that does what the
original does unless a patched module is on the stack. The stack is a thread-local linked list of
``(route, key, rest)`` whose entries are functions and numbers only, which is what torch.compile
together with gradient checkpointing can follow.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from sparsiattn.attention.sdpa import set_original_attention

Route = Callable[..., Tensor]
Frame = tuple[Route | None, int, Any]


class _Thread(threading.local):
    """Per-thread state. Set in ``__init__``: class defaults would trip Dynamo's guards."""

    def __init__(self) -> None:
        self.top: Frame | None = None
        # who called the hook that opened a scope, by its key: see `abandoned`
        self.callers: dict[int, FrameType] = {}
        self.disabled: tuple[int, ...] = ()
        self.image: tuple[int, int, int] | None = None
        self.shared: Any = None
        self.observer: tuple[int, Any] | None = None
        self.warming: int | None = None  # the patch whose kernels get ready in this forward pass
        self.meter: Any = None  # the `MacCounter` that counts this forward pass
        self.routed: set[int] = set()
        # what `carrying` keeps between the hooks of one block
        self.token_state: Any = None
        self.spared: Any = None
        self.asks = False
        self.asked: Any = None
        self.pending: Any = None
        self.notes: Any = None  # what planners keep for later sites
        self.branch: Any = None
        # patches whose model is running, and those whose caller wants original positions
        self.inside: tuple[int, ...] = ()
        self.features: tuple[int, ...] = ()

    def forget(self) -> None:
        """Drop what hooks of one forward pass hand each other."""
        self.token_state = self.spared = self.asked = self.pending = self.branch = None
        self.notes = None


THREAD = _Thread()
_INSTALL = threading.Lock()
_wrapper: Callable[..., Tensor] | None = None


def wrap(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``fallback`` with a look at the stack in front. A new function each time, so that wrapping
    somebody's wrapper of ours cannot recurse."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        operands = (query, key, value, attn_mask)
        if has_torch_function(operands):  # tensor subclasses ask which function was called
            return handle_torch_function(
                scaled_dot_product_attention, operands, *operands, dropout_p=dropout_p,
                is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        top = THREAD.top
        if top is not None and not torch.compiler.is_compiling():
            top = innermost(top)
        route = None if top is None else top[0]
        if top is None or route is None:
            extra: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
            return fallback(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **extra
            )
        if not torch.compiler.is_compiling():
            THREAD.routed.add(top[1])
        THREAD.top = None  # a route may call attention itself
        try:
            return route(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        finally:
            THREAD.top = top

    scaled_dot_product_attention.__doc__ = fallback.__doc__
    return scaled_dot_product_attention


def install() -> None:
    """Put the wrapper in place, over whatever stands there now; again if someone replaced it."""
    global _wrapper
    with _INSTALL:
        if F.scaled_dot_product_attention is _wrapper:
            return
        set_original_attention(F.scaled_dot_product_attention)
        _wrapper = wrap(F.scaled_dot_product_attention)
        register = getattr(getattr(torch.jit, "_builtins", None), "_register_builtin", None)
        if register is not None:  # or torch.jit.script of any model that calls SDPA fails
            register(_wrapper, "aten::scaled_dot_product_attention")
        F.scaled_dot_product_attention = _wrapper


def note_caller(key: int) -> None:
    """Remember who calls the hook that calls this, until `pop` or `forget_caller`."""
    THREAD.callers[key] = sys._getframe(2)


def forget_caller(key: int) -> None:
    THREAD.callers.pop(key, None)


def abandoned(key: int) -> bool:
    """Whether what was opened under this key is no longer running: an interrupt (Control-C, or
    whatever is no `Exception`) unwinds a forward pass without calling its forward hooks."""
    noted = THREAD.callers.get(key)
    if noted is None:
        return False
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller is noted:
            return False
        caller = caller.f_back
    return True


def innermost(top: Frame) -> Frame | None:
    """The innermost scope that is still running; those that were abandoned are closed."""
    found: Frame | None = top
    while found is not None and abandoned(found[1]):
        forget_caller(found[1])
        found = found[2]
    if found is not top:
        THREAD.top = found
    return found


def push(route: Route | None, key: int) -> None:
    THREAD.top = (route, key, THREAD.top)


def pop(key: int) -> None:
    """Close the scope ``key``; that it never opened (an earlier hook raised) is no error."""
    top = THREAD.top
    if top is not None and top[1] == key:
        THREAD.top = top[2]
    if not torch.compiler.is_compiling():
        forget_caller(key)


def forget_compiled() -> None:
    """Dynamo does not guard hooks: a graph compiled before this change would run on unchanged."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
