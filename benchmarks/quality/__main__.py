"""What lines of ``patch`` keep of real weights on photos, and how fast they are.

``python benchmarks/quality --quality --shared DIR --wheels DIR`` compares final features and
zero-shot answers with the dense model's; ``--speed`` times whole models in paired rounds (alone on
the machine). ``--line '{"strategy": "topk", "k": 0.1}'``, repeated, names what is typed. Rows that
were measured before are not measured again without ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import sparsiattn  # noqa: E402
from quality import rows, speed  # noqa: E402
from quality.metrics import Features, compare  # noqa: E402
from quality.models import SUBJECTS, Subject  # noqa: E402
from quality.sources import ROOT, Sources  # noqa: E402
from sparsiattn.kernels import compile_native  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsiattn" / "wheels"
LINES: list[dict[str, Any]] = [
    *({"strategy": "connectivity", "k": k} for k in (0.1, 0.25, 0.5)),
    *({"strategy": "topk", "k": k} for k in (0.1, 0.25)),
]
Lines = list[tuple[rows.Row, dict[str, Any]]]


def typed(line: dict[str, Any]) -> str:
    """The options of ``patch`` as a user types them."""
    return ", ".join(f"{name}={value!r}" for name, value in line.items()).replace("'", '"')


def missing(stage: str, given: argparse.Namespace, **of: Any) -> Lines:
    """Lines that have no row yet, each behind what names its row."""
    lines = [({**of, "line": typed(line)}, line) for line in given.line or LINES]
    return [pair for pair in lines if given.again or not rows.has(stage, pair[0])]


def judge(subject: Subject, name: str, sources: Sources, given: argparse.Namespace) -> None:
    """Quality of every line, on one model with real weights."""
    lines = missing("quality", given, model=name, photos=given.photos)
    if not subject.real or not lines:
        return
    model, images = subject.model(sources), subject.images(sources, given.photos)
    features = partial(Features.of, model, images, subject.text(sources), max(subject.batches))
    dense = features()
    for row, line in lines:
        with sparsiattn.patch(model, **line) as patch:
            figures = compare(dense, features()) | speed.settings(patch)
        rows.add("quality", row, figures)


def race(subject: Subject, name: str, sources: Sources, given: argparse.Namespace) -> None:
    """Time of every line, on one model."""
    for batch in subject.batches:
        lines = missing("speed", given, model=name, batch=batch, threads=given.threads)
        if lines:
            model, images = subject.model(sources), subject.images(sources, batch)
        for row, line in lines:
            rows.add("speed", row, speed.measure(model, images, line, given.rounds))


def line_of(text: str) -> dict[str, Any]:
    """A line from JSON; a list in it is a tuple in Python."""
    options = json.loads(text)
    return {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--line", type=line_of, action="append", help="options of patch, as JSON")
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", action="store_true", help="measure also what has its row")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--wheels", type=Path, default=CACHE)
    given = parser.parse_args(arguments)
    if not (given.quality or given.speed):
        parser.error("say --quality, --speed or both")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    failure = compile_native()
    if failure is not None:
        raise SystemExit(f"the native kernel cannot be compiled: {failure}")
    for chosen, stage in ((given.quality, judge), (given.speed, race)):
        for name in given.models if chosen else ():
            stage(SUBJECTS[name], name, Sources(given.shared, given.wheels), given)


if __name__ == "__main__":
    main()
