"""Fewer keys and fewer tokens in one schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsiattn.attention.budget import Budget
from sparsiattn.attention.geometry import Tile
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType, MismatchedPatch
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies.base import Budgets, Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.token_base import TokenStrategy

_ATTENTION = ("k", "tile", "background", "prefix_keys")
_TOKENS = ("keep", "layers", "restore")


@dataclass(frozen=True)
class Hybrid(Config):
    """An attention strategy and a token strategy together; by default connectivity and class-token
    drop, i.e. the paper's Sparsifiner-EViT (CVPR 2023, table 2).

    attention, tokens: names, or strategy objects for options beyond the ones here. k: share or
    count of the keys. tile, background, prefix_keys: of `Strategy`, as k is. keep: share or count
    of the tokens. layers, restore: of `TokenStrategy`, as keep is. None leaves the default (or what
    the object says). Predictor tables, windows and tiles follow the tokens that
    are left. Sites where the sparse kernel would lose stay dense unless ``only_if_faster=False``.

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
    tile: Tile | str | None = None
    background: int | str | None = "default"
    prefix_keys: bool | None = None
    restore: str | None = "default"

    def __post_init__(self) -> None:
        attention = self._part("attention", Strategy, _ATTENTION)
        tokens = self._part("tokens", TokenStrategy, _TOKENS)
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "tokens", tokens)
        for part, names in ((attention, _ATTENTION), (tokens, _TOKENS)):
            for name in names:
                object.__setattr__(self, name, getattr(part, name, None))

    def parts(self) -> tuple[Strategy, TokenStrategy]:
        return self.attention, self.tokens

    def _part(self, field: str, kind: type[Config], names: tuple[str, ...]) -> Any:
        """The strategy object behind ``attention`` or ``tokens``, with this config's options."""
        wanted = getattr(self, field)
        part = _built(wanted) if isinstance(wanted, (str, dict)) else wanted
        if not isinstance(part, kind):
            raise InvalidType(
                f"{field} must be the name of a {kind.__name__} or such an object, got {wanted!r}"
            )
        given = {name: getattr(self, name) for name in names}
        given = {
            name: value
            for name, value in given.items()
            if not (value == "default" or (value is None and name not in ("background", "restore")))
        }
        wrong = [name for name in given if name not in part.option_names()]
        if wrong:
            raise InvalidOption(
                f"{part.name!r} has no {', '.join(wrong)}; its options are {part.option_names()}: "
                f"give them in an object, {field}={type(part).__name__}(...)"
            )
        return replace(part, **given)


def _built(wanted: str | dict[str, Any]) -> Config:
    """A registered strategy by name, or from its JSON form."""
    if isinstance(wanted, str):
        found: type[Config] = REGISTRY.get("strategies", wanted)
        return found()
    if set(wanted) != {"name", "version", "options"}:
        raise InvalidOption(f"a strategy in JSON has name, version and options, got {wanted!r}")
    found = REGISTRY.get("strategies", wanted["name"])
    if found.version != wanted["version"]:
        raise MismatchedPatch(
            f"strategy {found.name!r} was saved in version {wanted['version']}, this is version "
            f"{found.version}"
        )
    return found.build(wanted["options"])
