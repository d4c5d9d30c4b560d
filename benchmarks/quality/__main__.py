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
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import sparsiattn  # noqa: E402
from quality import speed  # noqa: E402
from quality.metrics import Features, compare  # noqa: E402
from quality.models import SUBJECTS, Subject  # noqa: E402
from quality.rows import Rows, typed  # noqa: E402
from quality.sources import ROOT, Sources  # noqa: E402
from sparsiattn.kernels import compile_native  # noqa: E402

FILE = "quality-real"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsiattn" / "wheels"
LINES: list[dict[str, Any]] = [
    *({"strategy": "connectivity", "k": k} for k in (0.1, 0.25, 0.5)),
    *({"strategy": "topk", "k": k} for k in (0.1, 0.25)),
]
Lines = list[dict[str, Any]]


def judge(name: str, subject: Subject, sources: Sources, lines: Lines, photos: int) -> None:
    """Quality of every line, on one model."""
    assert subject.images is not None
    rows = Rows(FILE, "quality")
    model, images = subject.load(sources), subject.images(sources, photos)
    text = sources.text() if subject.answers else None
    batch = max(subject.batches)
    dense = Features.of(model, images, text, batch)
    for line in lines:
        with sparsiattn.patch(model, **line) as patch:
            figures = compare(dense, Features.of(model, images, text, batch))
            figures |= speed.settings(patch)
        rows.add({"model": name, "line": typed(line), "photos": photos}, figures)
        print(name, typed(line), figures, flush=True)


def race(name: str, subject: Subject, sources: Sources, line: dict[str, Any], of: dict[str, Any],
         rounds: int) -> None:  # fmt: skip
    """Time of one line, on one model at one batch size."""
    model, images = subject.load(sources), subject.inputs(sources, of["batch"])
    figures = speed.measure(model, images, line, rounds)
    Rows(FILE, "speed").add(of, figures)
    print(name, typed(line), figures, flush=True)


def run_quality(names: Sequence[str], sources: Sources, lines: Lines, given: Any) -> None:
    rows = Rows(FILE, "quality")
    for name in names:
        if SUBJECTS[name].images is None:
            continue
        missing = [
            line for line in lines
            if given.again
            or not rows.has({"model": name, "line": typed(line), "photos": given.photos})
        ]  # fmt: skip
        if missing:
            judge(name, SUBJECTS[name], sources, missing, given.photos)


def run_speed(names: Sequence[str], sources: Sources, lines: Lines, given: Any) -> None:
    rows = Rows(FILE, "speed")
    threads = torch.get_num_threads()
    for name in names:
        for batch in SUBJECTS[name].batches:
            for line in lines:
                of = {"model": name, "line": typed(line), "batch": batch, "threads": threads}
                if given.again or not rows.has(of):
                    race(name, SUBJECTS[name], sources, line, of, given.rounds)


def line_of(text: str) -> dict[str, Any]:
    """A line from JSON; a list in it is a tuple in Python."""
    options = json.loads(text)
    return {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}


def arguments() -> argparse.ArgumentParser:
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments()
    given = parser.parse_args(argv)
    if not (given.quality or given.speed):
        parser.error("say --quality, --speed or both")
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    failure = compile_native()
    if failure is not None:
        raise SystemExit(f"the native kernel cannot be compiled: {failure}")
    sources, lines = Sources(given.shared, given.wheels), given.line or LINES
    if given.quality:
        run_quality(given.models, sources, lines, given)
    if given.speed:
        run_speed(given.models, sources, lines, given)


if __name__ == "__main__":
    main()
