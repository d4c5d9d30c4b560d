"""Options of the whole model that a search chooses in addition to the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import product
from typing import Any

from sparsiattn.errors import InvalidOption, unknown
from sparsiattn.patching.apply import parts_of
from sparsiattn.strategies import Config, Hybrid

OptionsGrid = Mapping[str, Sequence[Any]]

SCHEDULED = ("k", "keep", "r", "ratio", "layers")
"""Options that a schedule sets."""


@dataclass(frozen=True)
class Setting:
    """One choice of options.

    Attributes:
        strategy: The strategy with these options.
        options: The chosen options.
    """

    strategy: Config
    options: dict[str, Any] = field(default_factory=dict)


def settings_of(strategy: Config, grid: OptionsGrid) -> list[Setting]:
    """All combinations of a grid, as in `sklearn`'s ``ParameterGrid``, without duplicates.

    Args:
        strategy: The strategy.
        grid: Values to choose from, by option.

    Raises:
        InvalidOption: An option is set by the schedule, or a value is out of range.
        UnknownName: The strategy has no such option.
    """
    known = [name for name in strategy.option_names() if name not in SCHEDULED]
    for name, values in grid.items():
        if name in SCHEDULED:
            raise InvalidOption(
                f"options_grid must not contain {name!r}, which the schedule sets: pass shares to "
                f"choose from as {'keys' if name == 'k' else 'tokens'}=, and blocks as layers="
            )
        if name not in known:
            raise unknown(f"option of strategy {strategy.name!r}:", name, known)
        if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or not values:
            raise InvalidOption(
                f"options_grid must have a list of values for every option, got {name}={values!r}"
            )
    settings: dict[str, Setting] = {}
    for values in product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        changed = replace(strategy, **options)
        settings.setdefault(repr(changed), Setting(changed, options))
    return list(settings.values())


def default_grid(strategy: Config) -> OptionsGrid:
    """Default values of tile and background to try, including the strategy's own."""
    attention, _ = parts_of(strategy)
    if "k" not in attention.option_names() or not attention.selects_keys:
        return {}
    backgrounds = [attention.background, "auto" if attention.background is None else None]
    grid: dict[str, list[Any]] = {"tile": [attention.tile, (4, 4)], "background": backgrounds}
    return {name: values for name, values in grid.items() if name in strategy.option_names()}


def without_budgets(strategy: Config) -> Config:
    """The strategy with default numbers of merged tokens, so that a schedule can set them."""
    if isinstance(strategy, Hybrid):
        return replace(strategy, tokens=without_budgets(strategy.tokens))
    if {"r", "ratio"} <= set(strategy.option_names()):
        defaults = type(strategy)()
        return replace(strategy, r=defaults.r, ratio=defaults.ratio)  # type: ignore[attr-defined,call-arg]
    return strategy


def patch_options(strategy: Config) -> dict[str, Any]:
    """Options that `patch` needs in addition to name and schedule to create this strategy."""
    names = [f for f in fields(strategy) if f.init and f.name not in SCHEDULED]
    required = any(f.default is MISSING and f.default_factory is MISSING for f in names)
    defaults = None if required else type(strategy)()
    options = {
        f.name: getattr(strategy, f.name)
        for f in names
        if defaults is None or getattr(strategy, f.name) != getattr(defaults, f.name)
    }
    if isinstance(strategy, Hybrid) and isinstance(defaults, Hybrid):
        for part in ("attention", "tokens"):
            if _differs_by_own_options(strategy, getattr(defaults, part), part):
                options.pop(part, None)
    return options


def _differs_by_own_options(hybrid: Hybrid, default: Config, part: str) -> bool:
    """Whether the hybrid's own options account for all differences of a part from the default."""
    present = getattr(hybrid, part)
    if type(present) is not type(default):
        return False
    shared = set(hybrid.option_names()) & set(default.option_names())
    return bool(replace(default, **{name: getattr(present, name) for name in shared}) == present)
