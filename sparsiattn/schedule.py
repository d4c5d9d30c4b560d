"""Per-site budgets from a mapping or a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.errors import InvalidOption, unknown
from sparsiattn.patterns import check_budget
from sparsiattn.site import Site
from sparsiattn.strategy import Strategy


def apply_schedule(
    schedule: Mapping[str, Any] | str | PathLike[str], sites: list[Site], configs: list[Strategy]
) -> list[Strategy]:
    """Configs with the budgets of ``{"k": {site name: budget}}`` put in; other sites unchanged."""
    budgets = _read(schedule)
    names = [site.name for site in sites]
    for name in budgets:
        if name not in names:
            raise unknown("site in schedule:", name, names)
    for config in configs:
        if "k" not in config.option_names():
            raise InvalidOption(f"strategy {config.name!r} has no k that a schedule could set")
    return [
        replace(config, k=check_budget(budgets[name])) if name in budgets else config  # type: ignore[call-arg]
        for name, config in zip(names, configs, strict=True)
    ]


def _read(schedule: Mapping[str, Any] | str | PathLike[str]) -> Mapping[str, Any]:
    read: object = schedule
    if not isinstance(schedule, Mapping):
        try:
            read = json.loads(Path(schedule).read_text())
        except (OSError, ValueError, TypeError) as error:
            raise InvalidOption(f"schedule {schedule!r} cannot be read as JSON: {error}") from error
    budgets = read.get("k") if isinstance(read, Mapping) and set(read) == {"k"} else None
    if not isinstance(budgets, Mapping):
        raise InvalidOption(f'a schedule must be {{"k": {{site: budget}}}}, got {read!r}')
    return budgets
