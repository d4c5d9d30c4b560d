"""Rows of figures in one file, which grow from run to run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import common

STAGES = ("quality", "speed")
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Those of one file under ``results/``."""

    file: str

    def read(self) -> dict[str, list[Row]]:
        """Rows of each stage."""
        path = common.RESULTS / f"{self.file}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        return {stage: content.get(stage, []) for stage in STAGES}

    def has(self, stage: str, name: Row) -> bool:
        """Whether there is a row of what ``name`` says."""
        return any(name.items() <= row.items() for row in self.read()[stage])

    def add(self, stage: str, name: Row, figures: Row) -> None:
        """Write a row, in place of one of the same name, beside what others wrote meanwhile."""
        rows = self.read()
        others = [row for row in rows[stage] if not name.items() <= row.items()]
        row = {**name, **figures, "made": common.made()}
        common.write(self.file, {**rows, stage: [*others, row]})
        print(*name.values(), figures, flush=True)
