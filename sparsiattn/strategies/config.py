"""What all strategies have in common: a named, immutable, JSON-serialisable config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from sparsiattn.errors import unknown

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """Base of every strategy. Subclasses are frozen dataclasses whose fields are their options."""

    registers_as: ClassVar[str] = "strategies"
    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    exact_at_full: ClassVar[bool] = True
    """Whether the full budget reproduces the dense model; if not, `list_strategies()` shows
    ``inexact_reason``."""
    inexact_reason: ClassVar[str] = ""
    needs_training: ClassVar[bool] = False
    kind: ClassVar[str] = ""
    """What it makes fewer of: ``"attention"``, ``"tokens"`` or ``"both"``."""
    paper: ClassVar[str] = ""
    """Address of the publication, if there is one."""
    fidelity: ClassVar[str] = ""
    """How close to it this is: ``"as published"``, ``"as published code"`` or ``"inspired by"``,
    then what differs."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form: ``{"name", "version", "options"}``."""
        options = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"name": self.name, "version": self.version, "options": options}

    @classmethod
    def option_names(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.init]

    @classmethod
    def build(cls: type[C], options: dict[str, Any]) -> C:
        """An instance from options by name; a wrong name is an error that lists the right ones."""
        for name in options:
            if name not in cls.option_names():
                raise unknown(f"option of strategy {cls.name!r}:", name, cls.option_names())
        return cls(**options)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
