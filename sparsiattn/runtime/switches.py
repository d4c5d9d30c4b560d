"""Attributes of a host that have another value where the patch is enabled, for each context.

`AttributeOverride.apply` would set them for all threads at once. Here the object gets its own class
with a property of that name instead. The property returns the value that the patch needs where the
patch is enabled, and the host's value inside `Patch.disabled`. The stored value is not changed, so
copies and configuration files are unaffected.
"""

from __future__ import annotations

from collections.abc import Callable
from copyreg import __newobj__  # type: ignore[attr-defined]
from dataclasses import dataclass
from typing import Any

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.attribute_override import AttributeOverride
from sparsiattn.runtime.class_swap import creation
from sparsiattn.runtime.patch_owner import PatchOwner

SWITCHES = "_sparsiattn_switches"
"""Class attribute of a switched object that holds its `Switch` objects by attribute name."""


@dataclass(eq=False)
class Switch:
    """One attribute of one object.

    Attributes:
        values: ``(patch, value)``, the value that each patch needs.
        before: The host's own value; ``...`` if it has none.
        exists: Whether the host has the attribute.
    """

    values: tuple[tuple[PatchOwner, Any], ...]
    before: Any
    exists: bool


class _Switched:
    """Mixin of the classes of switched objects: pickles and copies as the host's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if SWITCHES not in vars(type(self)):
            return reduced
        host = type(self).__bases__[1]
        make: Callable[..., Any] | None = reduced[0]
        if make is __newobj__:
            return (*creation(host), *reduced[2:])
        # the host reduces in its own way, whose arguments may contain the class
        arguments = tuple(host if a is type(self) else a for a in reduced[1])
        return (make, arguments, *reduced[2:])


def switch_on(override: AttributeOverride, owner: PatchOwner) -> None:
    """Make the attribute return the value that the patch needs, wherever the patch is enabled.

    Raises:
        InvalidOption: The class of the object cannot be replaced.
    """
    holder, name = override.module, override.attribute
    switches = _switches(holder)
    if switches is None or name not in switches:
        exists = override.before is not ...
        switch = Switch((), override.before, exists)
        _give_class(holder, {**(switches or {}), name: switch})
        switches = _switches(holder)
        assert switches is not None
    switches[name].values = (*switches[name].values, (owner, override.value))


def switch_off(override: AttributeOverride, owner: PatchOwner) -> None:
    """Undo `switch_on`; does nothing for an object that was not switched.

    If other code derived a class from the switched one meanwhile, that class stays, and the
    attribute returns the host's value.
    """
    holder, switches = override.module, _switches(override.module)
    if switches is None or override.attribute not in switches:
        return
    switch = switches[override.attribute]
    switch.values = tuple(pair for pair in switch.values if pair[0] is not owner)
    unused = not any(switch.values for switch in switches.values())
    if unused and SWITCHES in vars(type(holder)):
        holder.__class__ = type(holder).__bases__[1]


def _switches(holder: Any) -> dict[str, Switch] | None:
    switches: dict[str, Switch] | None = getattr(type(holder), SWITCHES, None)
    return switches


def _give_class(holder: Any, switches: dict[str, Switch]) -> None:
    kind = type(holder)
    host = kind.__bases__[1] if SWITCHES in vars(kind) else kind
    members: dict[str, Any] = {"__module__": host.__module__, SWITCHES: switches}
    members |= {name: _property(host, name, switch) for name, switch in switches.items()}
    try:
        holder.__class__ = type(host.__name__, (_Switched, host), members)
    except TypeError as error:
        raise InvalidOption(
            f"attribute {next(iter(switches))!r} of a {host.__name__} cannot be overridden for a "
            f"patch ({error}): a backbone can override attributes of modules and of their "
            "configurations only"
        ) from error


def _property(host: Any, name: str, switch: Switch) -> property:
    def read(holder: Any) -> Any:
        for owner, value in switch.values:
            if not owner.disabled_here:
                return value
        if not switch.exists:
            raise AttributeError(name)
        return switch.before

    def write(holder: Any, value: Any) -> None:
        # a value that is set later takes precedence, also while the patch is enabled
        switch.values, switch.before, switch.exists = (), value, True
        inherited: Any = getattr(host, name, None)
        if hasattr(type(inherited), "__set__"):
            inherited.__set__(holder, value)
        else:
            vars(holder)[name] = value

    return property(read, write)
