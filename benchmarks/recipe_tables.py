"""The table of docs/recipes.md: a goal, the call for it, its measured speed and quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from quality_tables import FINAL, NAMES, RESULTS, rows_of

Figures = tuple[float, str, str]
"""Speed, what is kept, and the name of the file of results."""


class Recipe(NamedTuple):
    """One row: ``subject`` is the model that was measured."""

    goal: str
    line: str
    subject: str
    figures: Callable[[], Figures]


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.with_name(f"{name}.json").read_text())
    return found


def _real(file: Path, model: str, line: str) -> Callable[[], Figures]:
    """A line on real weights: the row with the most photos."""

    def figures() -> Figures:
        rows = [row for row in rows_of(file, model) if row.line == line]
        row = max(rows, key=lambda row: int(row.kept.get("photos", 0)))
        return row.ratio, f"cosine {row.cosine:.3f}", file.stem

    return figures


def _batch(model: str, line: str, batch: int) -> Callable[[], Figures]:
    """A line at another batch size, with the quality of one image."""

    def figures() -> Figures:
        key = (model, line, batch)
        (row,) = (
            row
            for row in _load(RESULTS.stem)["speed"]
            if (row["model"], row["line"], row["batch"]) == key
        )
        return float(row["patched"]["ratio"]), _real(RESULTS, model, line)()[1], RESULTS.stem

    return figures


def _resolution() -> Figures:
    row = _load("resolution-cpu")["speedup"]["hybrid k=0.1 keep=0.5"]
    return float(row["ratio"]), "random weights", "resolution-cpu"


def _model(name: str) -> Callable[[], Figures]:
    def figures() -> Figures:
        rows = _load("models-cpu")["models"]
        row = next(row for row in rows if row["model"] == name and row["k"] == 0.1)
        return float(row["ratio"]), "random weights", "models-cpu"

    return figures


def _runtime(name: str) -> Callable[[], Figures]:
    def figures() -> Figures:
        row = _load("runtimes-cpu")["rows"][name]
        return float(row["ratio"]), "random weights", "runtimes-cpu"

    return figures


def _training() -> Figures:
    row = next(row for row in _load("train-step-cpu")["steps"] if row["k"] == 0.1)
    return float(row["ratio"]), "random weights", "train-step-cpu"


def _serving() -> Figures:
    rows = _load("serving-cpu")["rows"]
    ratio = rows["patched"][0]["per_second"] / rows["dense"][0]["per_second"]
    return float(ratio), "random weights", "serving-cpu"


MERGE, KEYS = 'strategy="token_merge"', 'strategy="connectivity", k=0.1'
CLIP, SMALL = "CLIP ViT-B/16, 224 px", "ViT-S/14, 518 px"
DROP = 'strategy="token_drop", keep=0.5'


def _one_image(goal: str, model: str, line: str, file: Path = RESULTS) -> Recipe:
    """A recipe for single images, measured with real weights."""
    return Recipe(goal, line, NAMES[model], _real(file, model, line))


RECIPES = (
    _one_image("224 px, one image", "clip-224", MERGE),
    Recipe("224 px, batches of 8", MERGE, CLIP, _batch("clip-224", MERGE, 8)),
    _one_image(
        "224 px, faster, with more loss", "clip-224", 'strategy="hybrid", k=0.25, keep=0.7', FINAL
    ),
    _one_image("518 px", "s14-518", MERGE),
    _one_image("518 px, at least 1.5x", "s14-518", 'strategy="token_merge", ratio=0.925', FINAL),
    _one_image("518 px, twice as fast", "s14-518", 'strategy="token_merge", ratio=0.885', FINAL),
    _one_image("518 px, all tokens kept", "s14-518", KEYS),
    _one_image("1,036 px", "s14-1036", KEYS),
    Recipe(
        "1,024 px, as fast as possible",
        'strategy="hybrid", k=0.1, keep=0.5',
        "ViT-S/16, 1024 px",
        _resolution,
    ),
    Recipe(
        "Segment Anything (SAM)", KEYS, "SAM ViT-B, 1024 px", _model("samvit_base_patch16_1024")
    ),
    Recipe(
        "`torch.compile`, 1,024 px",
        KEYS,
        "ViT-S/16, 1024 px",
        _runtime("vit-s-1024, batch 1, torch.compile"),
    ),
    Recipe(
        "ONNX Runtime, 1,024 px",
        KEYS,
        "ViT-S/16, 1024 px",
        _runtime("vit-s-1024, batch 1, ONNX Runtime"),
    ),
    Recipe(
        "torchao int8, compiled, 1,024 px",
        KEYS,
        "ViT-S/16, 1024 px",
        _runtime("vit-s-1024, batch 1, torchao int8, compiled"),
    ),
    Recipe("a training step at 518 px", KEYS, SMALL, _training),
    Recipe("more requests per second", DROP, "ViT-Ti/16, 224 px", _serving),
)


def recipes() -> str:
    """Goals by row, and the files that the figures are from."""
    head = ["goal", "`patch(model, ...)`", "speed", "quality", "measured on"]
    lines = [head, ["---"] * len(head)]
    files = []
    for recipe in RECIPES:
        speed, quality, name = recipe.figures()
        line = f"`{recipe.line.removeprefix('strategy=')}`"
        lines.append([recipe.goal, line, f"{speed:.2f}x", quality, recipe.subject])
        files.append(f"`benchmarks/results/{name}.json`")
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nResults, with command, date and machine: {', '.join(dict.fromkeys(files))}."


BLOCKS = {"recipes": recipes}
