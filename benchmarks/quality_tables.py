"""The table of what lines of ``patch`` keep of real weights, and how fast they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "quality-real.json"
NAMES = {
    "clip-224": "CLIP ViT-B/16, 224 px",
    "clip-384": "CLIP ViT-B/16, 384 px",
    "s14-518": "ViT-S/14, 518 px",
    "s14-1036": "ViT-S/14, 1036 px",
    "deit-s-224": "DeiT-S, 224 px",
    "vit-s-384": "ViT-S/16, 384 px",
    "vit-s-1024": "ViT-S/16, 1024 px",
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept() -> str:
    """Cosines to the dense model's features and the answers that stay."""
    rows = json.loads(RESULTS.read_text())["quality"]
    rows = sorted(rows, key=lambda row: list(NAMES).index(row["model"]))  # else as measured
    head = ["model", "`patch(model, ...)`", "photos", "patch features", "worst 5 %", "answers kept"]
    return _table(head, [_kept(row) for row in rows])


def _kept(row: dict[str, Any]) -> list[str]:
    features, answers = row["patches"], row.get("answers_kept")
    return [
        NAMES[row["model"]],
        f"`{row['line']}`",
        str(row["photos"]),
        f"{features['mean']:.3f}",
        f"{features['worst_5']:.3f}",
        "" if answers is None else f"{100 * answers:.0f} %",
    ]


def speeds() -> str:
    """Whole models in paired rounds, and what they would reach without any attention."""
    rows = json.loads(RESULTS.read_text())["speed"]
    rows = sorted(rows, key=lambda row: list(NAMES).index(row["model"]))
    head = ["model", "batch", "`patch(model, ...)`", "whole model", "without attention"]
    return _table(
        head,
        [
            [
                NAMES[row["model"]],
                str(row["batch"]),
                f"`{row['line']}`",
                f"{row['patched']['ratio']:.2f}x",
                f"{row['limit']['ratio']:.2f}x",
            ]
            for row in rows
        ],
    )


def sources() -> str:
    """Where the figures come from."""
    result = json.loads(RESULTS.read_text())
    cards = [row["made"] for row in (*result["quality"], *result["speed"])]
    places = sorted({(card["processor"], card["date"]) for card in cards})
    where = "; ".join(f"{processor}, {date}" for processor, date in places)
    versions = f"torch {cards[0]['torch']}, timm {cards[0]['timm']}"
    return (
        "`benchmarks/results/quality-real.json`: `python benchmarks/quality --quality --speed`, "
        f"{where}, {versions}; speed with 2 threads."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "real weights": kept,
    "real speeds": speeds,
    "source quality-real": sources,
}
