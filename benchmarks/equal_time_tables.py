"""Every method on real weights beside the quality of `token_merge` at the same speed.

Two methods with the same ``k`` or ``keep`` may differ in time and in MACs, so equal options compare
nothing. Both figures of a row are of one study, ``results/quality-sweep.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from quality_tables import SWEEP, rows_of

MODELS = {"clip-224": "CLIP, 224 px", "s14-518": "ViT-S/14, 518 px"}
YARDSTICK = 'strategy="token_merge"'
# lines of the strategies with many; of others, the line without options
LINES = (
    'strategy="connectivity", k=0.1',
    'strategy="connectivity", k=0.25',
    'strategy="topk", k=0.1, background="auto"',
    'strategy="topk", k=0.25, background="auto"',
    'strategy="local", k=0.25',
    'strategy="random", k=0.25',
    'strategy="token_drop", keep=0.9',
    'strategy="token_drop", keep=0.7',
    'strategy="token_drop", keep=0.7, score="random"',
    'strategy="hybrid", k=0.25, keep=0.7',
    'strategy="hybrid", k=0.25, tokens="token_merge"',
    'strategy="token_merge", ratio=0.95, method="pitome"',
)


def equal_time() -> str:
    """A row a line: speed, cosine, and the cosine of `token_merge` in the same time."""
    columns = ("speed", "cosine / of `token_merge` at this speed")
    head = ["setting", *(f"{name}: {column}" for name in MODELS.values() for column in columns)]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *map(_row, _lines())]
    )


def _lines() -> list[str]:
    """In the order of the study, those of `LINES` first."""
    rows = json.loads(SWEEP.read_text())["quality"]
    plain = dict.fromkeys(
        row["line"]
        for row in rows
        if row["line"].startswith("strategy=") and "," not in row["line"]
    )
    return [*LINES, *(line for line in plain if line != YARDSTICK)]


def _row(line: str) -> list[str]:
    cells = [cell for model in MODELS for cell in _cells(model, line)]
    return [f"`{line.removeprefix('strategy=')}`", *cells]


def _cells(model: str, line: str) -> tuple[str, str]:
    rows = rows_of(SWEEP, model)
    row = next((row for row in rows if row.line == line), None)
    if row is None:
        return "", f"{_untimed(model, line):.3f}"
    merged = [(r.ratio, r.cosine) for r in rows if r.line.startswith(YARDSTICK) and _is_plain(r)]
    other = interpolated(merged, row.ratio)
    beside = "" if other is None else f" / {other:.3f}"
    return f"{row.ratio:.2f}x", f"{row.cosine:.3f}{beside}"


def _is_plain(row: Any) -> bool:
    return not any(word in row.line for word in ("method", "dtype", "resolution"))


def _untimed(model: str, line: str) -> float:
    """The cosine of a line that lost so much that it was not timed."""
    rows = json.loads(SWEEP.read_text())["quality"]
    row = next(row for row in rows if (row["model"], row["line"]) == (model, line))
    return float(row["class_token" if "answers_kept" in row else "patches"]["mean"])


def interpolated(points: Iterable[tuple[float, float]], ratio: float) -> float | None:
    """What stays at a speed, between two measured points; None outside of them.

    Args:
        points: ``(speed, cosine)``; the dense model's, (1, 1), is added.
        ratio: The speed, dense time / patched time.
    """
    for (slow, high), (fast, low) in pairwise(sorted([(1.0, 1.0), *points])):
        if slow <= ratio <= fast and fast > slow:
            return high + (low - high) * (ratio - slow) / (fast - slow)
    return None


BLOCKS = {"methods equal time": equal_time}
