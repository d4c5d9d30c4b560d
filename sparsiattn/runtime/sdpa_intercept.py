"""Interception of attention: hooks open a scope, and a wrapper of SDPA reads it.

While a patch exists, `F.scaled_dot_product_attention` is replaced by a wrapper that calls the
original unless a patched module is on the stack. The stack is a thread-local linked list of
``(route, key, rest)``. Its entries are only functions and numbers, as torch.compile together with
gradient checkpointing cannot trace other objects.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.overrides import (
    get_overridable_functions,
    handle_torch_function,
    has_torch_function,
)

from sparsiattn.attention.layout import HostCall
from sparsiattn.attention.sdpa import original_attention, set_original_attention
from sparsiattn.runtime.open_call import NestedCall, OpenCall
from sparsiattn.runtime.thread_state import SITE_CALLS, Route, Scope, forget_models, forget_pass

_REPLACING = threading.RLock()
_HOLDERS: dict[int, ref[Any]] = {}
"""Objects that need the wrapper, by ``id``: patches, which may be deleted without `unpatch`."""
_WRAPPERS: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = []
"""Every wrapper with the function that it calls. A function gets one wrapper, which is kept:
torch.jit identifies functions by address, and compiled code stays valid for the next patch."""

MODULE_CALL = nn.Module._call_impl.__code__
"""Code object in which torch calls a module with its hooks."""
HOOKED_CALL = next((c for c in MODULE_CALL.co_consts if isinstance(c, CodeType)), MODULE_CALL)
"""Code object inside it that calls the hooks and the forward of a module with hooks."""
OUTER_CALL = nn.Module._wrapped_call_impl.__code__
"""Code object around it: the ``__call__`` of a module."""
_ANY_CALLS = (MODULE_CALL, HOOKED_CALL, OUTER_CALL)


def is_module_call(code: CodeType) -> bool:
    """Whether torch calls a module in this code object."""
    # by identity: a lookup in a set would hash the whole code object
    return code is HOOKED_CALL or code is MODULE_CALL


def wrap(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function so that it checks the stack before it runs.

    Every function has its own wrapper, so that wrapping another library's wrapper of ours cannot
    recurse.

    Args:
        fallback: The function to call outside patched modules.
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
            # a traced graph outlives the patch, so it must not contain the wrapper
            traced = any(isinstance(x, Proxy) for x in operands)
            called: Any = fallback if traced else scaled_dot_product_attention
            relevant: Any = operands
            options["enable_gqa"] = enable_gqa
            out: Tensor = handle_torch_function(called, relevant, *relevant, **options)
            return out
        top = SITE_CALLS.top
        compiling = torch.compiler.is_compiling()
        plain = top is None or compiling or is_called_by(top[1])
        if top is not None and not plain:
            top = innermost(top)
        route = None if top is None else top[0]
        if top is None or route is None or not (plain or opened_by_caller(top[1])):
            extra: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
            return fallback(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **extra
            )
        if not compiling:
            SITE_CALLS.routed.add(top[1])
        SITE_CALLS.top = None  # a route may call attention itself
        call = HostCall(*operands, dropout_p, is_causal, scale, enable_gqa)
        try:
            return route(call)
        finally:
            SITE_CALLS.top = top

    scaled_dot_product_attention.__doc__ = fallback.__doc__
    # pickle and generated code refer to a function by its public name
    scaled_dot_product_attention.__module__ = F.__name__
    scaled_dot_product_attention.__qualname__ = scaled_dot_product_attention.__name__
    return scaled_dot_product_attention


def hold(holder: Any) -> None:
    """Intercept attention until `release` is called or the holder is deleted."""
    number = id(holder)

    def died(_: ref[Any]) -> None:
        _HOLDERS.pop(number, None)
        _put_back()

    _HOLDERS[number] = ref(holder, died)
    install()


def release(holder: Any) -> None:
    """Undo `hold`; after the last release, torch's original function is restored."""
    _HOLDERS.pop(id(holder), None)
    _put_back()


class _Block:
    """Holder of the wrapper for a block of code."""


@contextmanager
def intercepted() -> Iterator[None]:
    """Intercept attention inside a with block."""
    block = _Block()
    hold(block)
    try:
        yield
    finally:
        release(block)


def install() -> None:
    """Install the wrapper around the present function, also if other code has replaced ours."""
    if F.scaled_dot_product_attention is _installed():
        return
    # torch caches its list of overridable functions, and Dynamo passes only these to modes, so the
    # list must be built with the original function
    get_overridable_functions()
    with _REPLACING:
        present = F.scaled_dot_product_attention
        behind = _behind(present)
        if behind is None:
            F.scaled_dot_product_attention = _wrapper_of(present)
        set_original_attention(present if behind is None else behind)


def _installed() -> Callable[..., Tensor] | None:
    """The wrapper in front of the function that `dense_attention` calls, if there is one."""
    original = original_attention()
    for wrapper, fallback in _WRAPPERS:  # no generator: this runs before every pass
        if fallback is original:
            return wrapper
    return None


def _put_back() -> None:
    """Remove the wrapper if nothing needs it; wrappers of other code around it stay."""
    with _REPLACING:
        behind = _behind(F.scaled_dot_product_attention)
        if behind is not None and not _HOLDERS:
            F.scaled_dot_product_attention = behind


def _behind(present: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """The function that a wrapper of ours calls; None if it is not our wrapper."""
    return next((fallback for wrapper, fallback in _WRAPPERS if wrapper is present), None)


def _wrapper_of(present: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known = next((wrapper for wrapper, fallback in _WRAPPERS if fallback is present), None)
    if known is not None:
        return known
    wrapper = wrap(present)
    register = getattr(getattr(torch.jit, "_builtins", None), "_register_builtin", None)
    if register is not None:  # otherwise torch.jit.script of a model that calls SDPA fails
        register(wrapper, "aten::scaled_dot_product_attention")
    _WRAPPERS.append((wrapper, present))
    return wrapper


def note_caller(key: int) -> OpenCall:
    """Store the frame that called the current hook, until `forget_caller`."""
    call = SITE_CALLS.callers[key] = OpenCall(sys._getframe(2), key, _let_go)
    return call


def note_nested_caller(key: int, model_call: OpenCall) -> None:
    """As `note_caller`, for a hook that runs inside the given call of its model."""
    SITE_CALLS.callers[key] = NestedCall(sys._getframe(2), model_call)


def forget_caller(key: int) -> None:
    """Undo `note_caller`."""
    SITE_CALLS.callers.pop(key, None)


def abandoned(key: int) -> bool:
    """Whether the call with this key is no longer running, see `OpenCall`."""
    caller = SITE_CALLS.callers.get(key)
    return caller is not None and not caller.runs()


def forget_abandoned() -> None:
    """Drop the scopes and tensors that an interrupt has left in this thread."""
    if torch.compiler.is_compiling():
        return
    keys = [key for key in SITE_CALLS.callers if abandoned(key)]
    if not keys:
        return
    for key in keys:
        forget_caller(key)
    SITE_CALLS.top = _without(SITE_CALLS.top, keys)
    forget_models([-key for key in keys])
    if not SITE_CALLS.callers:  # no other call is running that could need this state
        SITE_CALLS.shared = None
        forget_pass()


def _without(top: Scope | None, keys: list[int]) -> Scope | None:
    """The stack without the scopes of these keys."""
    if top is None:
        return None
    rest = _without(top[2], keys)
    return rest if top[1] in keys else (top[0], top[1], rest)


def _let_go() -> None:
    """Clean up after an interrupt ended a call, unless modules are running in this thread.

    Running modules may still need the state of this thread; the next pass cleans up then.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not any(frame.f_code is code for code in _ANY_CALLS):
        frame = frame.f_back
    if frame is None:
        forget_abandoned()


def opened_by_caller(key: int) -> bool:
    """Whether the innermost running module is the one that opened this scope.

    Attention that another module calls meanwhile (a model in a hook, nested attention) does not
    belong to the scope.
    """
    caller = None if torch.compiler.is_compiling() else SITE_CALLS.callers.get(key)
    if caller is None or SITE_CALLS.deferred:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not caller.is_of(frame):
        if is_module_call(frame.f_code):
            return False
        frame = frame.f_back
    return True


def is_called_by(key: int) -> bool:
    """Whether the innermost running module is known to have opened this scope.

    This is the usual case, and only the nearest frames are read. If it is False, `innermost` and
    `opened_by_caller` decide.
    """
    caller = SITE_CALLS.callers.get(key)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not is_module_call(frame.f_code):
        frame = frame.f_back
    return caller is not None and frame is not None and caller.is_of(frame)


def innermost(top: Scope) -> Scope | None:
    """The innermost scope that is still running; abandoned scopes are closed."""
    running: Scope | None = top
    while running is not None and abandoned(running[1]):
        forget_caller(running[1])
        running = running[2]
    if running is not top:
        SITE_CALLS.top = running
    return running


def push(route: Route | None, key: int) -> None:
    """Open a scope in this thread.

    Args:
        route: The function that computes attention; None for the host's own attention.
        key: Key of the scope.
    """
    SITE_CALLS.top = (route, key, SITE_CALLS.top)


def pop(key: int) -> None:
    """Close the scope ``key``, if it is open; it is not if an earlier hook raised."""
    top = SITE_CALLS.top
    if top is not None and top[1] == key:
        SITE_CALLS.top = top[2]


def forget_compiled() -> None:
    """Reset torch.compile, as Dynamo does not guard hooks: old graphs would ignore the change."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
