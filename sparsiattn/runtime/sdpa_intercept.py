"""How attention is reached: hooks open a scope, a wrapper of SDPA looks into it.

`F.scaled_dot_product_attention` is replaced, and never put back, by a function that does what the
original does unless a patched module is on the stack. The stack is a thread-local linked list of
``(route, key, rest)`` whose entries are functions and numbers only, which is what torch.compile
together with gradient checkpointing can follow.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import (
    get_overridable_functions,
    handle_torch_function,
    has_torch_function,
)

from sparsiattn.attention.layout import HostCall
from sparsiattn.attention.sdpa import set_original_attention
from sparsiattn.runtime.thread_state import SITE_CALLS, Route, Scope

_INSTALL = threading.Lock()
_FALLBACK = "_sparsiattn_fallback"
_REGISTERED: list[Any] = []
"""Functions that torch.jit knows by their address, which nothing else may have: they stay alive."""

_CALL = nn.Module._call_impl.__code__
MODULE_CALLS = frozenset({_CALL, *(c for c in _CALL.co_consts if isinstance(c, CodeType))})
"""The code in which torch calls hooks and forward of a module."""
_wrapper: Callable[..., Tensor] | None = None


def wrap(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``fallback`` with a look at the stack in front.

    A new function each time, so that wrapping somebody's wrapper of ours cannot recurse.
    """

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
            options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
            return handle_torch_function(
                scaled_dot_product_attention, operands, *operands, **options, enable_gqa=enable_gqa
            )
        top = SITE_CALLS.top
        if top is not None and not torch.compiler.is_compiling():
            top = innermost(top)
        route = None if top is None else top[0]
        if top is None or route is None or not opened_by_caller(top[1]):
            extra: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
            return fallback(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **extra
            )
        if not torch.compiler.is_compiling():
            SITE_CALLS.routed.add(top[1])
        SITE_CALLS.top = None  # a route may call attention itself
        call = HostCall(*operands, dropout_p, is_causal, scale, enable_gqa)
        try:
            return route(call)
        finally:
            SITE_CALLS.top = top

    scaled_dot_product_attention.__doc__ = fallback.__doc__
    setattr(scaled_dot_product_attention, _FALLBACK, fallback)
    return scaled_dot_product_attention


def install() -> None:
    """Put the wrapper in place, over whatever stands there now; again if someone replaced it."""
    global _wrapper
    with _INSTALL:
        if F.scaled_dot_product_attention is _wrapper:
            return
        before = getattr(F.scaled_dot_product_attention, _FALLBACK, None)
        if before is not None:  # an earlier wrapper is back: another one each time would add up
            _wrapper = F.scaled_dot_product_attention
            set_original_attention(before)
            return
        # torch lists functions once, with those that are there: Dynamo shows modes only these
        get_overridable_functions()
        set_original_attention(F.scaled_dot_product_attention)
        _wrapper = wrap(F.scaled_dot_product_attention)
        register = getattr(getattr(torch.jit, "_builtins", None), "_register_builtin", None)
        if register is not None:  # or torch.jit.script of any model that calls SDPA fails
            register(_wrapper, "aten::scaled_dot_product_attention")
            _REGISTERED.append(_wrapper)
        F.scaled_dot_product_attention = _wrapper


def note_caller(key: int) -> None:
    """Remember who calls the hook that calls this, until `pop` or `forget_caller`."""
    SITE_CALLS.callers[key] = sys._getframe(2)


def forget_caller(key: int) -> None:
    """Undo `note_caller`."""
    SITE_CALLS.callers.pop(key, None)


def abandoned(key: int) -> bool:
    """Whether what was opened under this key is no longer running.

    An interrupt (Control-C, or whatever is no `Exception`) unwinds a forward pass without calling
    its forward hooks.
    """
    caller_then = SITE_CALLS.callers.get(key)
    if caller_then is None:
        return False
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller is caller_then:
            return False
        caller = caller.f_back
    return True


def forget_abandoned() -> None:
    """Let go of frames, and of the tensors in them, that an interrupt has left in this thread."""
    for key in [key for key in SITE_CALLS.callers if abandoned(key)]:
        forget_caller(key)


def opened_by_caller(key: int) -> bool:
    """Whether the innermost module that runs is the one that opened this scope.

    Attention that another module calls meanwhile, a model in a hook or attention nested in
    attention, is none of the scope's business.
    """
    caller_then = None if torch.compiler.is_compiling() else SITE_CALLS.callers.get(key)
    if caller_then is None or SITE_CALLS.deferred:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not caller_then:
        if frame.f_code in MODULE_CALLS:
            return False
        frame = frame.f_back
    return True


def innermost(top: Scope) -> Scope | None:
    """The innermost scope that is still running; those that were abandoned are closed."""
    running: Scope | None = top
    while running is not None and abandoned(running[1]):
        forget_caller(running[1])
        running = running[2]
    if running is not top:
        SITE_CALLS.top = running
    return running


def push(route: Route | None, key: int) -> None:
    """Open a scope in this thread: attention goes that route, or None for the host's own."""
    SITE_CALLS.top = (route, key, SITE_CALLS.top)


def pop(key: int) -> None:
    """Close the scope ``key``; that it never opened (an earlier hook raised) is no error."""
    top = SITE_CALLS.top
    if top is not None and top[1] == key:
        SITE_CALLS.top = top[2]
    if not torch.compiler.is_compiling():
        forget_caller(key)


def forget_compiled() -> None:
    """Dynamo does not guard hooks: a graph compiled before this change would run on unchanged."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
