"""Who asks for original positions: methods and arguments of the host that return features.

While a model carries fewer tokens its class is swapped for one that notes which of its methods was
called. Unlike attributes of the instance, a class survives deepcopy and pickle; unlike hooks, its
methods are part of what torch.compile traces. Hooks of the model note the same where it runs
eagerly, also if something else replaced its ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.sdpa_intercept import THREAD, abandoned, forget_caller, install, note_caller

METHODS = ("forward_features", "forward_intermediates", "get_intermediate_layers")
OWNER, ROOT, HOST = "_sparsiattn_owner", "_sparsiattn_root", "_sparsiattn_host"


class Watched:
    """Mixin of the swapped classes: pickles and copies as (its host's class, its state)."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        host = vars(type(self)).get(HOST)
        return reduced if host is None else (_empty, (host,), *reduced[2:])


def _empty(host: type) -> Any:
    kind = watched_class(host)
    return kind.__new__(kind)


@cache
def watched_class(host: Any) -> Any:
    """A subclass of the host's class, of the same name, that notes how it is called."""
    methods: dict[str, Any] = {"forward": _forward(host)}
    methods |= {name: _features(host, name) for name in METHODS if hasattr(host, name)}
    return type(
        host.__name__, (Watched, host), {**methods, "__module__": host.__module__, HOST: host}
    )


def watch(module: nn.Module, owner: Any) -> None:
    vars(module)[OWNER], vars(module)[ROOT] = owner, module is owner.model
    kind: Any = type(module)
    module.__class__ = watched_class(kind)


def unwatch(module: nn.Module) -> None:
    """Give a module its own class back. Where something derived another one from ours meanwhile
    (parametrizations do), that one stays and does what the host's would."""
    for name in (OWNER, ROOT):
        vars(module).pop(name, None)
    host = vars(type(module)).get(HOST)
    if host is not None:
        setattr(module, "__class__", host)  # noqa: B010


def _forward(host: Any) -> Callable[..., Any]:
    """The host's forward, known to be the one that calls whatever runs inside."""

    @wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = vars(self).get(OWNER)
        if owner is None or is_inside(owner):
            return host.forward(self, *args, **kwargs)
        inside, features = THREAD.inside, THREAD.features
        if vars(self).get(ROOT):
            THREAD.inside = inside + (owner.key,)  # noqa: RUF005 (Dynamo cannot unpack here)
        if owner.key not in THREAD.disabled and _hidden_states(self, kwargs):
            THREAD.features = features_for(owner, "output_hidden_states=True")
        try:
            return host.forward(self, *args, **kwargs)
        finally:
            THREAD.inside, THREAD.features = inside, features
            THREAD.forget()

    return forward


def _features(host: Any, name: str) -> Callable[..., Any]:
    """A method of the host that returns features: outside the model's own forward its caller gets
    original positions."""
    method = getattr(host, name)

    @wraps(method)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = vars(self).get(OWNER)
        if owner is None or owner.key in THREAD.disabled:
            return method(self, *args, **kwargs)
        if is_inside(owner) and name == "forward_features":
            return method(self, *args, **kwargs)
        inside, before = THREAD.inside, THREAD.features
        THREAD.features = features_for(owner, f"{name}()")
        THREAD.inside = inside + (owner.key,)  # noqa: RUF005 (Dynamo cannot unpack here)
        try:
            return method(self, *args, **kwargs)
        finally:
            THREAD.inside, THREAD.features = inside, before
            THREAD.forget()

    return features


class EnterModel:
    """Forward pre-hook of the model: refuses to run if a patched site was replaced or deleted, and
    notes that what runs now runs inside the model's own forward."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        owner = self.owner
        if torch.compiler.is_compiling():
            return
        THREAD.top = None  # an interrupt (no Exception) may have left a scope open
        THREAD.forget()
        inside = is_inside(owner)
        install()  # somebody may have put the original function back
        owner.before_forward()
        owner.carried = None
        if owner.blocks and not inside:
            THREAD.inside = (*THREAD.inside, owner.key)
            note_caller(-owner.key)
            if owner.key not in THREAD.disabled and _hidden_states(module, kwargs):
                THREAD.features = features_for(owner, "output_hidden_states=True")


class LeaveModel:
    """Forward hook of the model, called also when it raised."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            leave_model(self.owner.key)


def leave_model(key: int) -> None:
    """The model of that patch runs no more."""
    forget_caller(-key)
    THREAD.inside = tuple(other for other in THREAD.inside if other != key)
    THREAD.features = tuple(other for other in THREAD.features if other != key)
    THREAD.forget()


def is_inside(owner: Any) -> bool:
    """Whether the patched model runs, and was not interrupted."""
    if owner.key not in THREAD.inside:
        return False
    if torch.compiler.is_compiling() or not abandoned(-owner.key):
        return True
    leave_model(owner.key)
    return False


def features_for(owner: Any, what: str) -> tuple[int, ...]:
    """The patches whose caller wants original positions, with this one; raises if it never may."""
    if owner.tokens is not None and owner.tokens.restore is None:
        raise InvalidOption(
            f"{what} returns one feature for each patch, and the patch was made with restore=None, "
            "which never puts tokens back: use restore='auto'"
        )
    return THREAD.features + (owner.key,)  # noqa: RUF005


def _hidden_states(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a transformers model was asked for the states after every block."""
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_hidden_states", False)
    return asked is not None and asked is not False
