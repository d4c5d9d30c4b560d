"""Who asks for original positions: methods and arguments of the host that return features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.interception import THREAD, install

METHODS = ("forward_features", "forward_intermediates", "get_intermediate_layers")


class FeatureMethod:
    """Stands before a method of the host that returns features, as an attribute of the instance:
    outside the model's own forward its caller gets original positions. Copies and pickles."""

    def __init__(self, owner: Any, module: nn.Module, name: str) -> None:
        self.owner, self.module, self.name = owner, module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.name)
        if self.owner is None:  # in the copy without data that a dry run makes
            return method(self.module, *args, **kwargs)
        key, inside = self.owner.key, THREAD.inside
        if self.name == "forward_features" and key in inside:
            return method(self.module, *args, **kwargs)
        if not inside:
            THREAD.stream = None  # an error may have left one
        before = THREAD.features
        THREAD.features = features_for(self.owner, f"{self.name}()")
        THREAD.inside = (*inside, key)  # forward_intermediates may call forward_features
        try:
            return method(self.module, *args, **kwargs)
        finally:
            THREAD.features, THREAD.inside = before, inside


class EnterModel:
    """Forward pre-hook of the model: it must be whole, and whether its caller wants features."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        owner = self.owner
        if not torch.compiler.is_compiling():
            THREAD.top = None  # an interrupt (no Exception) may have left a scope open
            THREAD.stream = None
            install()  # somebody may have put the original function back
            owner.before_forward()
        if owner.blocks:
            THREAD.inside = (*THREAD.inside, owner.key)
            if owner.key not in THREAD.disabled and _hidden_states(module, kwargs):
                THREAD.features = features_for(owner, "output_hidden_states=True")


class LeaveModel:
    """Forward hook of the model, called also when it raised."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        key = self.owner.key
        THREAD.inside = without(THREAD.inside, key)
        if key not in THREAD.inside:
            THREAD.features = without(THREAD.features, key)


def features_for(owner: Any, what: str) -> tuple[int, ...]:
    """The patches whose caller wants original positions, with this one; raises if it never may."""
    if owner.tokens is not None and owner.tokens.restore is None:
        raise InvalidOption(
            f"{what} returns one feature for each patch, and the patch was made with restore=None, "
            "which never puts tokens back: use restore='auto'"
        )
    return (*THREAD.features, owner.key)


def without(keys: tuple[int, ...], key: int) -> tuple[int, ...]:
    """``keys`` with the last ``key`` taken out."""
    for i in range(len(keys) - 1, -1, -1):
        if keys[i] == key:
            return keys[:i] + keys[i + 1 :]
    return keys


def _hidden_states(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a transformers model was asked for the states after every block."""
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_hidden_states", False)
    return asked is not None and asked is not False
