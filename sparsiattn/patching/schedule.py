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
    """The configs with the budgets of ``{site name: budget}``; other sites are unchanged."""
    names = [site.name for site in sites]
    for name in budgets:
        if name not in names:
            raise unknown("site in schedule:", name, names)
    for config in configs if budgets else ():
        if "k" not in config.option_names():
            raise InvalidOption(
                f"a schedule of k needs a strategy with the option k, got {config.name!r}"
            )
    return [
        replace(config, k=check_budget(budgets[name])) if name in budgets else config  # type: ignore[call-arg]
        for name, config in zip(names, configs, strict=True)
    ]


def token_budgets(
    schedule: Mapping[str, Any], tokens: TokenStrategy, blocks: Sequence[str]
) -> TokenStrategy:
    """The config with budgets by block; exactly the blocks in the schedule reduce.

    Args:
        schedule: ``{"keep": {block name or index: budget}}``; other kinds are ignored.
        tokens: The strategy.
        blocks: Names of the model's blocks.

    Raises:
        InvalidOption: The strategy takes no such budgets, or a block has two.
        UnknownName: There is no such block.
    """
    kinds = [kind for kind in schedule if kind in tokens.per_layer]
    if not kinds:
        return tokens
    kind = kinds[0]
    if len(kinds) > 1 or kind not in tokens.option_names():
        raise InvalidOption(f"strategy {tokens.name!r} takes no schedule of {kinds}")
    budgets: dict[int, Any] = {}
    for name, budget in schedule[kind].items():
        index = int(name) if str(name).isdigit() else None
        if name in blocks:
            index = blocks.index(name)
        if index is None or index >= len(blocks):
            raise unknown("block in schedule:", name, blocks)
        if index in budgets:
            raise InvalidOption(f"block {blocks[index]!r} has two budgets in the schedule")
        budgets[index] = budget
    layers = sorted(budgets)
    changes: dict[str, Any] = {"layers": layers, kind: [budgets[layer] for layer in layers]}
    return replace(tokens, **changes)


def read_schedule(schedule: Schedule, kinds: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Read a schedule and check its form.

    Args:
        schedule: ``{"k": {site: budget}}``, ``{"keep": {block: budget}}``, both, or a JSON file.
            The entry ``about`` (which `search` writes) is for people and is ignored.
        kinds: The kinds of budgets that the strategy takes.

    Returns:
        Budgets by kind.

    Raises:
        InvalidOption: The file cannot be read, or has another form.
    """
    content: Any = schedule
    if schedule is None:
        return {}
    if not isinstance(schedule, Mapping):
        try:
            content = json.loads(Path(schedule).read_text())
        except (OSError, ValueError, TypeError) as error:
            raise InvalidOption(f"schedule {schedule!r} cannot be read as JSON: {error}") from error
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if key != "about"}
        if content and all(k in kinds and isinstance(v, Mapping) for k, v in content.items()):
            return dict(content)
    forms = " or ".join(
        '{"k": {site: budget}}' if kind == "k" else f'{{"{kind}": {{block: budget}}}}'
        for kind in kinds
    )
    raise InvalidOption(f"a schedule must be {forms or 'None'}, got {content!r}")
