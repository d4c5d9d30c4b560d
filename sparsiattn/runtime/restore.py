"""Detect calls that need original positions: methods and arguments that return features.

While a model carries fewer tokens its class is swapped for one that notes which of its methods was
called. Unlike attributes of the instance, a class survives deepcopy and pickle; unlike hooks, its
methods are traced by torch.compile. In eager mode, hooks of the model note the same, also if
something else replaced its ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.runtime import monitor
from sparsiattn.runtime.call_key import call_key
from sparsiattn.runtime.class_swap import Swapped, swap_class, swap_class_back
from sparsiattn.runtime.hook_tools import ScriptRefusal, refuse_fx
from sparsiattn.runtime.ownership import is_inside, leave_model, runs_elsewhere
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.runtime.sdpa_intercept import forget_abandoned, install, note_caller
from sparsiattn.runtime.thread_state import MODEL_CALL, SITE_CALLS, forget_pass

FEATURE_METHODS = ("forward_features", "forward_intermediates", "get_intermediate_layers")
OWNER, ROOT = "_sparsiattn_owner", "_sparsiattn_root"


class Watched(Swapped):
    """Mixin of a host's class that notes which of its methods was called."""

    @staticmethod
    def members(host: Any) -> dict[str, Any]:
        names = [name for name in FEATURE_METHODS if hasattr(host, name)]
        return {"forward": _watched_forward(host)} | {n: _watched_method(host, n) for n in names}


def watch(module: nn.Module, owner: PatchOwner) -> None:
    """Note how the module is called, for a patch."""
    vars(module)[OWNER], vars(module)[ROOT] = owner, module is owner.model
    swap_class(module, Watched)


def unwatch(module: nn.Module) -> None:
    """Undo `watch`; does nothing if the module is not watched."""
    for name in (OWNER, ROOT):
        vars(module).pop(name, None)
    swap_class_back(module, Watched)


def modules_with_features(state: PatchState, copied: nn.Module | None = None) -> list[nn.Module]:
    """The model, and each of its submodules with methods that return features.

    The list is empty if the patch shortens no sequence.

    Args:
        state: The patch.
        copied: A copy of the patched model, whose modules are returned instead.
    """
    if not state.shortens:
        return []
    model = state.model if copied is None else copied
    return [
        module
        for module in model.modules()
        if module is model
        or any(hasattr(type(module), name) for name in FEATURE_METHODS)
        or hasattr(type(module), "main_input_name")  # a transformers model inside another
    ]


def _call_inside(
    method: Callable[..., Any],
    inside: tuple[int, ...],
    features: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a method of the host with these values of `ModelCall`'s ``inside`` and ``features``."""
    before = MODEL_CALL.inside, MODEL_CALL.features
    MODEL_CALL.inside, MODEL_CALL.features = inside, features
    try:
        return method(*args, **kwargs)
    finally:
        MODEL_CALL.inside, MODEL_CALL.features = before
        forget_pass()


def _watched_forward(host: Any) -> Callable[..., Any]:
    """The host's forward, which records that the code inside it runs in the patched model."""

    @wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_fx((*args, *kwargs.values()))
        owner = vars(self).get(OWNER)
        if owner is None or is_inside(owner):
            return host.forward(self, *args, **kwargs)
        inside, features = MODEL_CALL.inside, MODEL_CALL.features
        if vars(self).get(ROOT):
            inside = inside + (owner.key,)  # noqa: RUF005 (Dynamo cannot unpack here)
        if not owner.disabled_here:
            features = _features_of(owner, self, args, kwargs)
        return _call_inside(host.forward, inside, features, self, *args, **kwargs)

    return forward


def _watched_method(host: Any, name: str) -> Callable[..., Any]:
    """A method of the host that returns features.

    If it is not called from the model's own forward, it returns original positions.
    """
    method = getattr(host, name)

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = vars(self).get(OWNER)
        if owner is None or owner.disabled_here:
            return method(self, *args, **kwargs)
        if is_inside(owner) and name == "forward_features":
            return method(self, *args, **kwargs)
        features = _with_features(owner, f"{name}()")
        inside = MODEL_CALL.inside + (owner.key,)  # noqa: RUF005 (Dynamo cannot unpack here)
        return _call_inside(method, inside, features, self, *args, **kwargs)

    return call


class EnterModel(ScriptRefusal):
    """Forward pre-hook of the model.

    Raises `ModelChanged` if a patched site was replaced or deleted, and records that the model's
    own forward is running.
    """

    def __init__(self, owner: PatchState) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        owner = self.owner
        if torch.compiler.is_compiling():
            return
        forget_abandoned()
        SITE_CALLS.top = None  # an interrupt (not an Exception) may have left a scope open
        forget_pass()
        inside = is_inside(owner)
        install()  # other code may have restored the original function
        owner.check_sites()
        owner.last_pass = None
        if not inside:
            if owner.active_monitor is not None:
                monitor.enter(owner, training=module.training or "_is_replica" in vars(module))
            if owner.shortens and not owner.disabled_here:
                MODEL_CALL.features = _features_of(owner, module, args, kwargs)
            for runtime in owner.runtimes:
                if not runtime.is_idle:
                    runtime.repeated.look_at(runtime.planner)
            MODEL_CALL.inside = (*MODEL_CALL.inside, owner.key)
            owner.running[get_ident()] = note_caller(-owner.key)


class LeaveModel(ScriptRefusal):
    """Forward hook of the model, also called when the model raised.

    Raises `ModelChanged` if another thread undid the patch during the pass, as the rest of the
    pass was dense.
    """

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        owner = self.owner
        if torch.compiler.is_compiling():
            return
        # `is_inside` walks the stack, so call it only if needed
        began_here = not owner.alive and is_inside(owner)
        disabled = began_here and owner.disabled_here
        if owner.monitored:
            monitor.leave(owner, finished=output is not None)
        leave_model(owner.key)
        owner.running.pop(get_ident(), None)
        if owner.alive:
            return
        if not runs_elsewhere(owner) and owner.leave_hook is not None:
            owner.leave_hook.remove()
        if began_here and output is not None and not disabled:
            raise ModelChanged(
                "unpatch() was called in another thread during this forward pass, so only part of "
                "the pass was sparse: run it again, and wait for passes to end before unpatch()"
            )


def _features_of(
    owner: PatchOwner, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[int, ...]:
    """Keys of the patches whose caller needs original positions, for a call of a (sub)module."""
    if _wants_hidden_states(module, kwargs):
        return _with_features(owner, "output_hidden_states=True")
    if not vars(module).get(ROOT) or not _needs_all(owner, module.training, args, kwargs):
        return MODEL_CALL.features
    return _with_features(owner, "a call with these arguments or in this mode")


def _needs_all(owner: PatchOwner, training: bool, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the caller or the model's own code needs more positions than blocks restore."""
    key = call_key(owner, args, kwargs, training=training)
    known = owner.known_calls.get(key)
    if known is None and torch.compiler.is_compiling():
        return True
    if known is None:
        known = owner.known_calls[key] = owner.call_needs_all(args, kwargs)
    return known


def _with_features(owner: PatchOwner, call: str) -> tuple[int, ...]:
    """Keys of the patches whose caller needs original positions, including this one.

    Raises:
        InvalidOption: The patch was made with ``restore=None``.
    """
    if owner.tokens is not None and owner.tokens.restore is None:
        raise InvalidOption(
            f"{call} returns one feature for each patch token, but the patch was made with "
            "restore=None, which never restores tokens: use restore='auto'"
        )
    return MODEL_CALL.features + (owner.key,)  # noqa: RUF005


def _wants_hidden_states(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller of a transformers model requests the hidden states of every block."""
    requested = kwargs.get("output_hidden_states")
    if requested is None:
        requested = getattr(getattr(module, "config", None), "output_hidden_states", False)
    return requested is not None and requested is not False
