"""`AttributeOverride`: an attribute of the host that patching switches and unpatching restores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttributeOverride:
    """One attribute of one module, or of its configuration.

    Attributes:
        module: The object that holds the attribute.
        attribute: Name of the attribute.
        value: The value that patching sets.
        before: The value that unpatching restores; ``...`` if the attribute did not exist.

    >>> from torch import nn
    >>> module = nn.Dropout(0.5)
    >>> override = AttributeOverride(module, "p", value=0.0, before=0.5)
    >>> override.apply()
    >>> module.p
    0.0
    >>> override.revert()
    >>> module.p
    0.5
    """

    module: Any
    attribute: str
    value: Any
    before: Any

    def apply(self) -> None:
        """Set the new value."""
        setattr(self.module, self.attribute, self.value)

    def revert(self) -> None:
        """Restore the former value."""
        if self.before is ...:
            vars(self.module).pop(self.attribute, None)
        else:
            setattr(self.module, self.attribute, self.before)
