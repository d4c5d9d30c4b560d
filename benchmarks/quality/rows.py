"""Rows of figures in one file, which grow from run to run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import common

CARD = ("date", "commit", "processor", "threads", "torch", "timm")


def typed(line: dict[str, Any]) -> str:
    """The options of ``patch`` as a user types them."""
    return ", ".join(f"{name}={value!r}" for name, value in line.items()).replace("'", '"')


@dataclass(frozen=True)
class Rows:
    """Rows of one stage, ``"quality"`` or ``"speed"``. A row is named by what it was measured of.

    Attributes:
        file: Name of the file of results, without its ending.
        stage: The list of rows in it.
    """

    file: str
    stage: str

    def read(self) -> dict[str, list[dict[str, Any]]]:
        path = common.RESULTS / f"{self.file}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return {stage: found.get(stage, []) for stage in ("quality", "speed")}

    def has(self, of: dict[str, Any]) -> bool:
        return any(of.items() <= row.items() for row in self._plain())

    def add(self, of: dict[str, Any], figures: dict[str, Any]) -> None:
        """Write a row, in place of one of the same name. Reads again: others may write too."""
        stages = self.read()
        kept = [row for row in stages[self.stage] if not of.items() <= _hashable(row).items()]
        card = common.machine()
        made = {name: card[name] for name in CARD}
        stages[self.stage] = [*kept, {**of, **figures, "made": made}]
        common.write(self.file, stages)

    def _plain(self) -> list[dict[str, Any]]:
        return [_hashable(row) for row in self.read()[self.stage]]


def _hashable(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if isinstance(value, str | int)}
