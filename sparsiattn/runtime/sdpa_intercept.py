"""How attention is reached: hooks open a scope, a wrapper of SDPA looks into it.

While a patch lives, `F.scaled_dot_product_attention` is replaced by a function that does what the
original does unless a patched module is on the stack. The stack is a thread-local linked list of
``(route, key, rest)`` whose entries are functions and numbers only, which is what torch.compile
together with gradient checkpointing can follow.
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
"""What needs the wrapper, by its identity: live patches, which may die without `unpatch`."""
_WRAPPERS: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = []
"""Every wrapper and what it calls: each function gets one, which stays. torch.jit knows functions
by their address, and code compiled with a wrapper is right again when the next patch comes."""

MODULE_CALL = nn.Module._call_impl.__code__
"""The code in which torch calls a module, hooks included."""
HOOKED_CALL = next((c for c in MODULE_CALL.co_consts if isinstance(c, CodeType)), MODULE_CALL)
"""The code inside it that calls the hooks and the forward of a module with hooks."""
OUTER_CALL = nn.Module._wrapped_call_impl.__code__
"""The code around it, where a module is called by its name."""
_ANY_CALLS = (MODULE_CALL, HOOKED_CALL, OUTER_CALL)


def is_module_call(code: CodeType) -> bool:
    """Whether torch calls a module in this code."""
    # by identity: to look a code object up in a set, Python hashes all of it
    return code is HOOKED_CALL or code is MODULE_CALL


def wrap(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``fallback`` with a look at the stack in front.

    One for each function, so that wrapping somebody's wrapper of ours cannot recurse.
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
            # a graph that somebody traces outlives the patch
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
    # pickles and generated code name a function by where others find it
    scaled_dot_product_attention.__module__ = F.__name__
    scaled_dot_product_attention.__qualname__ = scaled_dot_product_attention.__name__
    return scaled_dot_product_attention


def hold(holder: Any) -> None:
    """Intercept attention until `release`, or as long as the holder lives."""
    number = id(holder)

    def died(_: ref[Any]) -> None:
        _HOLDERS.pop(number, None)
        _put_back()

    _HOLDERS[number] = ref(holder, died)
    install()


def release(holder: Any) -> None:
    """Undo `hold`; after the last one torch is as it was."""
    _HOLDERS.pop(id(holder), None)
    _put_back()


class _Block:
    """Holds the wrapper for a block of code."""


@contextmanager
def intercepted() -> Iterator[None]:
    """Attention is intercepted inside the block."""
    block = _Block()
    hold(block)
    try:
        yield
    finally:
        release(block)


def install() -> None:
    """Put the wrapper in place, over whatever stands there now; again if someone replaced it."""
    if F.scaled_dot_product_attention is _installed():
        return
    # torch lists functions once, with those that are there: Dynamo shows modes only these
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
    """Take the wrapper away if nothing needs it; where others stand in front, they stay."""
    with _REPLACING:
        behind = _behind(F.scaled_dot_product_attention)
        if behind is not None and not _HOLDERS:
            F.scaled_dot_product_attention = behind


def _behind(present: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """What a wrapper of ours calls; None for any other function."""
    return next((fallback for wrapper, fallback in _WRAPPERS if wrapper is present), None)


def _wrapper_of(present: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known = next((wrapper for wrapper, fallback in _WRAPPERS if fallback is present), None)
    if known is not None:
        return known
    wrapper = wrap(present)
    register = getattr(getattr(torch.jit, "_builtins", None), "_register_builtin", None)
    if register is not None:  # or torch.jit.script of any model that calls SDPA fails
        register(wrapper, "aten::scaled_dot_product_attention")
    _WRAPPERS.append((wrapper, present))
    return wrapper


def note_caller(key: int) -> OpenCall:
    """Remember who calls the hook that calls this, until `pop` or `forget_caller`."""
    call = SITE_CALLS.callers[key] = OpenCall(sys._getframe(2), key, _let_go)
    return call


def note_nested_caller(key: int, model_call: OpenCall) -> None:
    """As `note_caller`, for a hook that runs in this call of its model."""
    SITE_CALLS.callers[key] = NestedCall(sys._getframe(2), model_call)


def forget_caller(key: int) -> None:
    """Undo `note_caller`."""
    SITE_CALLS.callers.pop(key, None)


def abandoned(key: int) -> bool:
    """Whether what was opened under this key is no longer running: see `OpenCall`."""
    caller = SITE_CALLS.callers.get(key)
    return caller is not None and not caller.runs()


def forget_abandoned() -> None:
    """Let go of scopes and tensors that an interrupt has left in this thread."""
    if torch.compiler.is_compiling():
        return
    keys = [key for key in SITE_CALLS.callers if abandoned(key)]
    if not keys:
        return
    for key in keys:
        forget_caller(key)
    SITE_CALLS.top = _without(SITE_CALLS.top, keys)
    forget_models([-key for key in keys])
    if not SITE_CALLS.callers:  # nothing else runs that these could be of
        SITE_CALLS.shared = None
        forget_pass()


def _without(top: Scope | None, keys: list[int]) -> Scope | None:
    """A stack without these scopes."""
    if top is None:
        return None
    rest = _without(top[2], keys)
    return rest if top[1] in keys else (top[0], top[1], rest)


def _let_go() -> None:
    """An interrupt ended a call: what it left goes at once, unless modules run here.

    What these have handed on must stay; the next pass sees to the rest.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not any(frame.f_code is code for code in _ANY_CALLS):
        frame = frame.f_back
    if frame is None:
        forget_abandoned()


def opened_by_caller(key: int) -> bool:
    """Whether the innermost module that runs is the one that opened this scope.

    Attention that another module calls meanwhile, a model in a hook or attention nested in
    attention, is none of the scope's business.
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
    """Whether the innermost module that runs is known to have opened this scope, and still runs.

    The usual case, told by the nearest frames; where this is False, `innermost` and
    `opened_by_caller` tell.
    """
    caller = SITE_CALLS.callers.get(key)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not is_module_call(frame.f_code):
        frame = frame.f_back
    return caller is not None and frame is not None and caller.is_of(frame)


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


def forget_compiled() -> None:
    """Dynamo does not guard hooks: a graph compiled before this change would run on unchanged."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
