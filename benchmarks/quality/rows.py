"""Rows of figures in one file, which grow from run to run."""

from __future__ import annotations

import json
from typing import Any

import common

STAGES = ("quality", "speed")
CARD = ("date", "commit", "processor", "threads", "torch", "timm")
FILE = "quality-real"
Row = dict[str, Any]


def read() -> dict[str, list[Row]]:
    """Rows of each stage."""
    path = common.RESULTS / f"{FILE}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    return {stage: content.get(stage, []) for stage in STAGES}


def has(stage: str, name: Row) -> bool:
    """Whether there is a row of what ``name`` says."""
    return any(name.items() <= row.items() for row in read()[stage])


def add(stage: str, name: Row, figures: Row) -> None:
    """Write a row, in place of one of the same name, beside what others have written meanwhile."""
    rows = read()
    others = [row for row in rows[stage] if not name.items() <= row.items()]
    card = common.machine()
    made = {"made": {key: card[key] for key in CARD}}  # rows of one file come from many runs
    common.write(FILE, {**rows, stage: [*others, {**name, **figures, **made}]})
    print(*name.values(), figures, flush=True)
