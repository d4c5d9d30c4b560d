"""A study: every line on a few photos, then the best of them on all.

``--study sweep`` measures each line of `lines` on eight photos, in a few paired runs. Lines slower
than the dense model are left out. Those that no other beats in both figures are the frontier; the
rest follow in layers, as in non-dominated sorting, until ``KEPT`` lines of a model are chosen for
``--study final``: all photos, labelled images where the model has text vectors, more rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from quality import lines
from quality.rows import Row, Rows
from quality.variants import Line, typed

KEPT, DEPTH = 12, 12  # lines of a model; blocks of all models with real weights
# these are in every final, whether they were among the best or not
ALWAYS: tuple[Line, ...] = (
    {"strategy": "connectivity", "k": 0.1},
    {"strategy": "connectivity", "k": 0.25},
    {"strategy": "token_merge"},
    {"strategy": "token_merge", "ratio": 0.9},
    {"strategy": "hybrid", "k": 0.25, "keep": 0.7},
    {"resolution": 0.75},
)


@dataclass(frozen=True)
class Study:
    """What is measured how thoroughly.

    Attributes:
        rows: Its file.
        lines: Those of a model, by its name.
        photos: Number of photos.
        labelled: Number of labelled images.
        rounds: Paired runs.
        batches: Whether all batch sizes are timed, not just one image.
    """

    rows: Rows
    lines: Callable[[str], list[Line]]
    photos: int
    labelled: int = 0
    rounds: int = 15
    batches: bool = True


def chosen(rows: Rows, model: str) -> list[Line]:
    """The lines of a sweep that the final takes."""
    found = rows.read()
    points = {
        row["line"]: (speed["patched"]["ratio"], kept(row))
        for row in found["quality"]
        for speed in found["speed"]
        if (row["model"], row["line"]) == (speed["model"], speed["line"]) == (model, speed["line"])
        and "refused" not in row
        and speed["patched"]["ratio"] > 1
    }
    for line in ALWAYS:
        points.pop(typed(line), None)
    best: list[str] = []
    for layer in layers(points):
        best += spread(layer, KEPT - len(ALWAYS) - len(best))
    by_name = {typed(line): line for line in lines.lines(DEPTH)}
    return [*ALWAYS, *(by_name[line] for line in best)]


def spread(layer: list[str], count: int) -> list[str]:
    """At most so many of a layer, evenly from its slowest to its fastest."""
    if count >= len(layer):
        return layer
    return [layer[(2 * i + 1) * len(layer) // (2 * count)] for i in range(count)]


def kept(row: Row) -> float:
    """Mean cosine of what the answers come from: CLIP's class token, else patch features."""
    features = row["class_token" if "answers_kept" in row else "patches"]
    return float(features["mean"])


def layers(points: dict[str, tuple[float, float]]) -> list[list[str]]:
    """Names in layers: those that no other beats in both figures, then those of the rest, ..."""
    left, found = dict(points), []
    while left:
        layer = [a for a in left if not any(beats(left[b], left[a]) for b in left)]
        found.append(sorted(layer, key=left.__getitem__))
        left = {name: point for name, point in left.items() if name not in layer}
    return found


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether ``a`` is nowhere below ``b``, and somewhere above."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


TYPED = Study(Rows("quality-real"), lambda model: lines.FEW, photos=32)
SWEEP = Study(
    Rows("quality-sweep"), lambda model: lines.lines(DEPTH), photos=8, rounds=5, batches=False
)
FINAL = Study(Rows("quality-final"), partial(chosen, SWEEP.rows), photos=200, labelled=1000)
STUDIES = {"sweep": SWEEP, "final": FINAL}
