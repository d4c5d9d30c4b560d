"""A key for the way a model is called: calls with different keys may take different code paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsiattn.runtime.patch_owner import PatchOwner


def call_key(
    owner: PatchOwner, args: Sequence[Any], kwargs: Mapping[str, Any], *, training: bool
) -> tuple[Any, ...]:
    """The training mode and the arguments that differ from their defaults; tensors by type only."""
    named = list(zip(owner.parameters, args, strict=False)) + list(kwargs.items())
    non_default = [
        (name, _described(value))
        for name, value in named
        if isinstance(value, Tensor) or value is not owner.defaults.get(name, Ellipsis)
    ]
    surplus = max(0, len(args) - len(owner.parameters))
    return (training, surplus, *sorted(non_default, key=_name))


def _name(entry: tuple[str, Any]) -> str:
    return entry[0]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "a tensor"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple([_described(item) for item in value])
    if isinstance(value, dict):
        return tuple([(str(name), _described(item)) for name, item in value.items()])
    return type(value).__name__
