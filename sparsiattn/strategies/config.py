"""`Config`, the base of all strategies: a named, immutable config that can be saved as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ClassVar, TypeVar

from sparsiattn.errors import (
    MismatchedPatch,
    RenamedMember,
    RenamedMembers,
    unknown,
    warn_renamed,
)

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config(RenamedMembers):
    """Base of every strategy. Subclasses are frozen dataclasses whose fields are their options.

    Attributes:
        registers_as: The kind of plug-in, for the registry.
        name: The name that users pass to `patch`.
        version: Version of the config format. Increase it when saved configs get another meaning;
            configs of other versions are refused.
        exact_at_full: Whether the full budget reproduces the dense model; if not,
            `list_strategies()` shows ``inexact_reason``.
        inexact_reason: Why it does not.
        needs_training: Whether the strategy is useless before training.
        kind: What it reduces: ``"attention"``, ``"tokens"`` or ``"both"``.
        paper: URL of the publication, if there is one.
        fidelity: How close the strategy is to the publication: ``"as published"``, ``"as published
            code"`` or ``"inspired by"``, followed by the differences.
        renamed_options: Old names of options to new ones; see `with_renamed_options`.
    """

    renamed_members: ClassVar[Mapping[str, str]] = {"inexact": "inexact_reason"}

    registers_as: ClassVar[str] = "strategies"
    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    exact_at_full: ClassVar[bool] = True
    inexact_reason: ClassVar[str] = ""
    needs_training: ClassVar[bool] = False
    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    fidelity: ClassVar[str] = ""
    renamed_options: ClassVar[Mapping[str, str]] = {}

    def to_dict(self) -> dict[str, Any]:
        """JSON form: ``{"name", "version", "options"}``."""
        options = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"name": self.name, "version": self.version, "options": options}

    def call_text(self) -> str:
        """Name and the options that differ from their defaults.

        >>> from sparsiattn.strategies import TopK
        >>> TopK(k=0.1).call_text(), TopK().call_text()
        ('topk(k=0.1)', 'topk')
        """
        shown = [
            f"{name}={_shown(getattr(self, name))}"
            for name, default in self._defaults().items()
            if getattr(self, name) != default
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def _defaults(self) -> dict[str, Any]:
        """By name, what options are if nobody sets them."""
        return {f.name: f.default for f in fields(self)}

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options, in the order of the fields."""
        return [f.name for f in fields(cls) if f.init]

    @classmethod
    def build(cls: type[C], options: Mapping[str, Any]) -> C:
        """Make an instance from options by name.

        Raises:
            UnknownName: There is no such option; the message lists the existing ones.
        """
        options = cls.current_options(options)
        for name in options:
            if name not in cls.option_names():
                raise unknown(f"option of strategy {cls.name!r}:", name, cls.option_names())
        return cls(**options)

    @classmethod
    def from_dict(cls: type[C], saved: Mapping[str, Any]) -> C:
        """Make the config from the result of `to_dict`; old names of options are accepted.

        Raises:
            MismatchedPatch: It was saved by another version.
        """
        if saved["version"] != cls.version:
            raise MismatchedPatch(
                f"strategy {cls.name!r} was saved in version {saved['version']}, but this is "
                f"version {cls.version}: make the patch again"
            )
        return cls.build(cls.current_options(saved["options"], warn=False))

    @classmethod
    def current_options(cls, options: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
        """Options by their current names.

        Args:
            options: Options by current or old names.
            warn: Whether an old name causes a `DeprecationWarning`.
        """
        for old in options:
            if warn and old in cls.renamed_options:
                new = f"{cls.renamed_options[old]}="
                warn_renamed(f"{cls.__name__}({old}=)", new, stacklevel=4)
        return {cls.renamed_options.get(name, name): value for name, value in options.items()}


def _shown(value: object) -> str:
    if isinstance(value, Config):
        return value.call_text()
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)


def with_renamed_options(**renamed: str) -> Callable[[type[C]], type[C]]:
    """A decorator, used above ``@dataclass``, that accepts old names of options with a warning.

    Args:
        renamed: New names by old names.
    """

    def decorate(cls: type[C]) -> type[C]:
        init = cls.__init__

        @wraps(init)
        def init_by_any_name(self: C, *args: Any, **options: Any) -> None:
            init(self, *args, **cls.current_options(options))

        cls.__init__ = init_by_any_name  # type: ignore[assignment,method-assign]
        cls.renamed_options = renamed
        for old, new in renamed.items():
            setattr(cls, old, RenamedMember(old, new))
        return cls

    return decorate


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
