"""Budgets by site or by block, from a mapping or a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.attention.budget import check_budget
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, unknown
from sparsiattn.strategies.base import Strategy
from sparsiattn.strategies.token_base import TokenStrategy

Schedule = Mapping[str, Any] | str | PathLike[str] | None


def apply_schedule(
    budgets: Mapping[str, Any], sites: list[Site], configs: list[Strategy]
) -> list[Strategy]:
    """Configs with the budgets of ``{site name: budget}`` put in; other sites unchanged."""
    names = [site.name for site in sites]
    for name in budgets:
        if name not in names:
            raise unknown("site in schedule:", name, names)
    for config in configs if budgets else ():
        if "k" not in config.option_names():
            raise InvalidOption(f"strategy {config.name!r} has no k that a schedule could set")
    return [
        replace(config, k=check_budget(budgets[name])) if name in budgets else config  # type: ignore[call-arg]
        for name, config in zip(names, configs, strict=True)
    ]


def token_budgets(
    schedule: Mapping[str, Any], tokens: TokenStrategy, blocks: Sequence[str]
) -> TokenStrategy:
    """The config with ``{"keep": {block name or index: budget}}`` put in: the blocks named there
    are those that reduce."""
    kinds = [kind for kind in schedule if kind in tokens.per_layer]
    if not kinds:
        return tokens
    kind = kinds[0]
    if len(kinds) > 1 or kind not in tokens.option_names():
        raise InvalidOption(f"strategy {tokens.name!r} takes no schedule of {kinds}")
    found = {}
    for name, budget in schedule[kind].items():
        index = int(name) if str(name).isdigit() else None
        if name in blocks:
            index = blocks.index(name)
        if index is None or index >= len(blocks):
            raise unknown("block in schedule:", name, blocks)
        if index in found:
            raise InvalidOption(f"block {blocks[index]!r} has two budgets in the schedule")
        found[index] = budget
    layers = sorted(found)
    changes: dict[str, Any] = {"layers": layers, kind: [found[layer] for layer in layers]}
    return replace(tokens, **changes)


def read_schedule(schedule: Schedule, kinds: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """``{"k": {site: budget}}``, ``{"keep": {block: budget}}`` or both, checked for its form; what
    stands under ``about`` (as `search` writes it) is for people."""
    read: object = schedule
    if schedule is None:
        return {}
    if not isinstance(schedule, Mapping):
        try:
            read = json.loads(Path(schedule).read_text())
        except (OSError, ValueError, TypeError) as error:
            raise InvalidOption(f"schedule {schedule!r} cannot be read as JSON: {error}") from error
    if isinstance(read, Mapping):
        read = {key: value for key, value in read.items() if key != "about"}
    fits = (
        isinstance(read, Mapping)
        and read
        and all(key in kinds and isinstance(value, Mapping) for key, value in read.items())
    )
    if not fits or not isinstance(read, Mapping):
        forms = " or ".join(
            '{"k": {site: budget}}' if kind == "k" else f'{{"{kind}": {{block: budget}}}}'
            for kind in kinds
        )
        raise InvalidOption(f"a schedule must be {forms or 'None'}, got {read!r}")
    return dict(read)
