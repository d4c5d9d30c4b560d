"""Tables of quality and speed of settings on models with real weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import places

RESULTS = Path(__file__).resolve().parent / "results" / "quality-real.json"
SWEEP = RESULTS.with_name("quality-sweep.json")
FINAL = RESULTS.with_name("quality-final.json")
NAMES = {
    "clip-224": "CLIP ViT-B/16, 224 px",
    "clip-384": "CLIP ViT-B/16, 384 px",
    "s14-224": "ViT-S/14, 224 px",
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
    head = [
        "model",
        "`patch(model, ...)`",
        "number of photos",
        "patch features",
        "worst 5 %",
        "answers kept",
    ]
    return _table(head, [_kept(row) for row in rows])


def _kept(row: dict[str, Any]) -> list[str]:
    features, answers = row["patches"], row.get("answers_kept")
    return [
        NAMES[row["model"]],
        f"`{row['line']}`",
        str(row["photos"]),
        f"{features['mean']:.3f}",
        f"{features['worst_5']:.3f}",
        "-" if answers is None else f"{100 * answers:.0f} %",
    ]


def speeds() -> str:
    """Whole models in paired rounds, and what they would reach without any attention."""
    rows = json.loads(RESULTS.read_text())["speed"]
    rows = sorted(rows, key=lambda row: list(NAMES).index(row["model"]))
    head = ["model", "batch", "`patch(model, ...)`", "speed", "bound"]
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


# models of one width at four sizes, and their tokens
EXPECTED = {"deit-s-224": 197, "vit-s-384": 577, "s14-518": 1370, "vit-s-1024": 4097}
TYPED = (
    'strategy="token_merge"', 'strategy="connectivity", k=0.1', 'strategy="connectivity", k=0.25',
)  # fmt: skip


def expected() -> str:
    """Whole models by number of tokens, one image each."""
    head = ["model", "tokens", "bound", *(f"`{line.removeprefix('strategy=')}`" for line in TYPED)]
    return _table(head, [_expected(model, tokens) for model, tokens in EXPECTED.items()])


def _expected(model: str, tokens: int) -> list[str]:
    found = json.loads(RESULTS.read_text())["speed"]
    rows = {row["line"]: row for row in found if (row["model"], row["batch"]) == (model, 1)}
    ratios = [f"{rows[line]['patched']['ratio']:.2f}x" if line in rows else "" for line in TYPED]
    bound = rows['strategy="connectivity", k=0.1']["limit"]["ratio"]
    return [NAMES[model], f"{tokens:,}", f"{bound:.2f}x", *ratios]


def sources(file: Path = RESULTS, options: str = "--quality --speed") -> str:
    """Where the figures come from."""
    result = json.loads(file.read_text())
    cards = [row["made"] for row in (*result["quality"], *result["speed"])]
    versions = f"torch {cards[0]['torch']}, timm {cards[0]['timm']}"
    return (
        f"`benchmarks/results/{file.name}`: `python benchmarks/quality {options}`, "
        f"{places(cards)}, {versions}; speed with 2 threads."
    )


class Row(NamedTuple):
    """One line on one model: what it keeps, and how fast it is for one image."""

    line: str
    kept: dict[str, Any]
    speed: dict[str, Any]

    @property
    def ratio(self) -> float:
        return float(self.speed["patched"]["ratio"])

    @property
    def features(self) -> dict[str, Any]:
        """Cosines of the class token where answers come from it, else of patch features."""
        of_class: dict[str, Any] = self.kept["class_token"]
        return of_class if "answers_kept" in self.kept else self.kept["patches"]

    @property
    def cosine(self) -> float:
        return float(self.features["mean"])


def rows_of(file: Path, model: str) -> list[Row]:
    """Lines that have both figures, the fastest last."""
    result = json.loads(file.read_text())
    speeds = {
        row["line"]: row
        for row in result["speed"]
        if row["model"] == model and row["batch"] == 1 and "refused" not in row
    }
    rows = [
        Row(row["line"], row, speeds[row["line"]])
        for row in result["quality"]
        if row["model"] == model and row["line"] in speeds and "refused" not in row
    ]
    return sorted(rows, key=lambda row: row.ratio)


def measured(model: str) -> list[Row]:
    """Every line of a study, the fastest last: from the final if it is there, else the sweep."""
    rows = [row for file in (SWEEP, FINAL) for row in rows_of(file, model)]
    lines = {row.line: row for row in sorted(rows, key=lambda row: int(row.kept["photos"]))}
    return sorted(lines.values(), key=lambda row: row.ratio)


def frontier(rows: list[Row]) -> list[Row]:
    """Lines faster than the dense model that no other beats in speed and cosine, by speed."""
    best = [row for row in rows if row.ratio > 1 and not any(_beats(x, row) for x in rows)]
    return sorted(best, key=lambda row: row.ratio)


def _beats(a: Row, b: Row) -> bool:
    """Whether ``a`` is better. A few photos, which happen to be easy ones, say little of many."""
    at_least = a.ratio >= b.ratio and a.cosine >= b.cosine
    different = (a.ratio, a.cosine) != (b.ratio, b.cosine)
    return at_least and different and bool(a.kept["photos"] >= b.kept["photos"])


# lines that people ask for, whether they are on the frontier or not
ASKED = (
    'strategy="connectivity", k=0.1', 'strategy="connectivity", k=0.25', 'strategy="token_merge"',
    'strategy="token_drop", keep=0.7', "resolution=0.75", "resolution=0.875", 'dtype="bfloat16"',
)  # fmt: skip


def settings(model: str) -> str:
    """The frontier of a study, and lines that people ask for."""
    rows = measured(model)
    best = frontier(rows)
    shown = [row for row in rows if row in best or row.line in ASKED]
    columns: dict[str, Callable[[Row], str]] = {
        "setting": lambda row: f"`{row.line}`" + (" *" if row in best else ""),
        "speed": lambda row: f"{row.ratio:.2f}x",
        "cosine": lambda row: f"{row.cosine:.3f}",
        "worst 5 %": lambda row: f"{row.features['worst_5']:.3f}",
    }
    if "answers_kept" in rows[0].kept:
        columns["answers kept"] = lambda row: f"{100 * row.kept['answers_kept']:.0f} %"
        columns["top-1"] = lambda row: f"{100 * row.kept['top1']:.1f}" if "top1" in row.kept else ""
    if "saliency_error" in rows[0].kept:
        columns["saliency error"] = lambda row: f"{row.kept['saliency_error']:.3f}"
    columns["GMACs"] = lambda row: f"{row.speed['macs'] / 1e9:.1f}"
    columns["activations, MB"] = lambda row: f"{row.speed['peak_bytes'] / 1e6:.0f}"
    columns["photos"] = lambda row: str(row.kept["photos"])
    return _table(list(columns), [[cell(row) for cell in columns.values()] for row in shown])


# the study's models, and what people want of each: the lines for it
STUDIED = ("clip-224", "clip-384", "s14-224", "s14-518", "s14-1036")
_CONNECTIVITY, _MERGE = 'strategy="connectivity", k=0.1', 'strategy="token_merge"'
GOALS: dict[str, tuple[tuple[str, ...], ...]] = {
    "nearly the same features": (
        (f"{_MERGE}, ratio=0.975",),
        ('strategy="token_drop", keep=0.9',),
        (_CONNECTIVITY,),
        (f"{_MERGE}, ratio=0.975",),
        (f"{_MERGE}, ratio=0.975",),
    ),
    "all tokens, fewer keys": (
        (_CONNECTIVITY,),
        (_CONNECTIVITY,),
        (_CONNECTIVITY,),
        ('strategy="connectivity", k=0.25', _CONNECTIVITY),
        ('strategy="connectivity", k=0.25', _CONNECTIVITY),
    ),
    "1.2x": (
        ('strategy="token_drop", keep=0.8', _MERGE),
        ('strategy="token_drop", keep=0.8',),
        (f"{_MERGE}, ratio=0.925",),
        (_MERGE,),
        (f"{_MERGE}, ratio=0.975",),
    ),
    "1.4x": (
        ('strategy="hybrid", k=0.25, keep=0.7', 'strategy="token_drop", keep=0.6'),
        ('strategy="diffrate"', 'strategy="hybrid", k=0.25, keep=0.7'),
        (f"{_MERGE}, ratio=0.9", "resolution=0.8125"),
        (_MERGE, f"{_MERGE}, ratio=0.925"),
        (_MERGE,),
    ),
    "2x": (
        ("resolution=0.625",),
        ("resolution=0.75",),
        ("resolution=0.625",),
        (f"{_MERGE}, ratio=0.885", "resolution=0.75"),
        (f"{_MERGE}, ratio=0.925", f"{_MERGE}, ratio=0.9"),
    ),
    "3x and more": (
        ("resolution=0.5",),
        ("resolution=0.5",),
        ("resolution=0.5",),
        ("resolution=0.625",),
        (f"{_MERGE}, ratio=0.85", "resolution=0.625"),
    ),
}


def goals() -> str:
    """Lines by what people want."""
    by_line = [{row.line: row for row in measured(model)} for model in STUDIED]
    body = [
        [
            text,
            *(
                "; ".join(_point(rows[line]) for line in lines)
                for rows, lines in zip(by_line, wanted, strict=True)
            ),
        ]
        for text, wanted in GOALS.items()
    ]
    return _table(["you want", *(NAMES[model] for model in STUDIED)], body)


def _point(row: Row) -> str:
    line = row.line.removeprefix("strategy=").replace('"', "")
    return f"`{line}`: {row.ratio:.2f}x at {row.cosine:.3f}"


# a model and the line that the README shows of it
SIZES = {
    "clip-224": 'strategy="token_merge"',
    "clip-384": 'strategy="token_merge"',
    "s14-518": 'strategy="token_merge"',
    "s14-1036": 'strategy="connectivity", k=0.1',
}


def sizes() -> str:
    """One line as typed at each of four sizes."""
    head = ["model", "`patch(model, ...)`", "speed", "cosine", "answers kept", "number of photos"]
    return _table(head, [_size(model, line) for model, line in SIZES.items()])


def _size(model: str, line: str) -> list[str]:
    rows = [row for row in rows_of(RESULTS, model) if row.line == line]
    row = max(rows, key=lambda row: row.kept["photos"])
    answers = row.kept.get("answers_kept")
    return [
        NAMES[model],
        f"`{line}`",
        f"{row.ratio:.2f}x",
        f"{row.cosine:.3f}",
        "-" if answers is None else f"{100 * answers:.0f} %",
        str(row.kept["photos"]),
    ]


BLOCKS: dict[str, Callable[[], str]] = {
    "real weights": kept,
    "real speeds": speeds,
    "expected speeds": expected,
    "source quality-real": sources,
    "sizes": sizes,
    "goals": goals,
    **{f"settings {model}": partial(settings, model) for model in STUDIED},
    "source quality-sweep": partial(sources, SWEEP, "--study sweep --quality --speed"),
    "source quality-final": partial(sources, FINAL, "--study final --quality --speed"),
}
