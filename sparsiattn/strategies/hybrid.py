"""The strategy `hybrid`: fewer keys and fewer tokens together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsiattn.attention.budget import Budget
from sparsiattn.attention.geometry import Sides
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies.base import Budgets, Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.token_base import TokenStrategy

_ATTENTION = ("k", "max_keys", "tile", "background", "prefix_keys")
_TOKENS = ("keep", "layers", "restore")
# Options for which None is a value, so that "default" means not set.
_NULLABLE = ("background", "restore")


@dataclass(frozen=True)
class Hybrid(Config):
    """An attention strategy and a token strategy together, by default connectivity and token drop.

    The default is the paper's Sparsifiner-EViT (CVPR 2023, table 2). Predictor tables, windows and
    tiles adapt to the remaining tokens. Merged tokens have no neighbours to share keys with, so
    ``tile="auto"`` is 1 with a strategy that merges. Sites where the sparse kernel would be slower
    stay dense unless ``only_if_faster=False``. None leaves an option at its default, or at the
    value in the object.

    Args:
        k: Share or count of the keys.
        keep: Share or count of the tokens.
        layers: As in `TokenStrategy`.
        attention: Name of an attention strategy, or an object for options beyond the ones here.
        tokens: Name of a token strategy, or an object.
        tile: As in `Strategy`.
        background: As in `Strategy`; None disables it.
        prefix_keys: As in `Strategy`.
        max_keys: As in `Strategy`.
        restore: As in `TokenStrategy`; None disables it.

    >>> hybrid = Hybrid(k=0.25, keep=0.5)
    >>> hybrid.attention.name, hybrid.tokens.keep
    ('connectivity', 0.5)
    """

    name = "hybrid"
    paper = "https://arxiv.org/abs/2303.13755"
    fidelity = "as published: a token drop and connectivity together; here any pair of strategies"
    kind = "both"

    k: Budgets | None = None
    keep: Budget | str | Sequence[Budget] | Callable[[Site], Budget] | None = None
    layers: Sequence[int] | None = None
    attention: Any = "connectivity"
    tokens: Any = "token_drop"
    tile: int | Sides | str | None = None
    background: int | str | None = "default"
    prefix_keys: bool | None = None
    max_keys: int | None = None
    restore: str | None = "default"

    def __post_init__(self) -> None:
        attention = self._part("attention", Strategy, _ATTENTION)
        tokens = self._part("tokens", TokenStrategy, _TOKENS)
        if tokens.merges() and attention.tile == "auto":
            attention = replace(attention, tile=1)
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "tokens", tokens)
        for part, names in ((attention, _ATTENTION), (tokens, _TOKENS)):
            for name in names:
                object.__setattr__(self, name, getattr(part, name, None))

    def _defaults(self) -> dict[str, Any]:
        defaults = {name: getattr(type(self)(), name) for name in self.option_names()}
        for name, default in defaults.items():
            own = getattr(self, name)
            is_missing = own is None and name not in _NULLABLE  # its part has no such option
            # options of the default parts are those of the hybrid
            if is_missing or (isinstance(own, Config) and type(own) is type(default)):
                defaults[name] = own
        return defaults

    def parts(self) -> tuple[Strategy, TokenStrategy]:
        """The attention strategy and the token strategy."""
        return self.attention, self.tokens

    def _part(self, field: str, kind: type[Config], names: tuple[str, ...]) -> Any:
        """The strategy object for ``attention`` or ``tokens``, with this config's options."""
        value = getattr(self, field)
        part = _build(value) if isinstance(value, (str, dict)) else value
        if not isinstance(part, kind):
            raise InvalidType(
                f"{field} must be the name of a {kind.__name__} or a {kind.__name__} object, got "
                f"{value!r}"
            )
        options = {
            name: option
            for name in names
            if (option := getattr(self, name)) != "default"
            and (option is not None or name in _NULLABLE)
        }
        wrong = [name for name in options if name not in part.option_names()]
        if wrong:
            raise InvalidOption(
                f"{part.name!r} has no {', '.join(wrong)}; its options are {part.option_names()}: "
                f"pass an object, {field}={type(part).__name__}(...)"
            )
        return replace(part, **options)


def _build(description: str | dict[str, Any]) -> Config:
    """A registered strategy by name, or from its JSON form."""
    if isinstance(description, str):
        return REGISTRY.get("strategies", description)()  # type: ignore[no-any-return]
    if set(description) != {"name", "version", "options"}:
        raise InvalidOption(
            f"a strategy in JSON must have name, version and options, got {description!r}"
        )
    kind: type[Config] = REGISTRY.get("strategies", description["name"])
    return kind.from_dict(description)
