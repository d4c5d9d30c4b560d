"""What lines of ``patch`` keep of real weights on photos, and how fast they are.

``python benchmarks/quality --quality --shared DIR --wheels DIR`` compares final features and
zero-shot answers with the dense model's; ``--speed`` times whole models in paired rounds (alone on
the machine). ``--line '{"strategy": "topk", "k": 0.1}'``, repeated, names what is typed;
``--study`` takes all lines of a study. Rows that were measured before are not measured again
without ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import sparsiattn  # noqa: E402
from quality import speed  # noqa: E402
from quality.exam import Exam  # noqa: E402
from quality.models import SUBJECTS, Subject  # noqa: E402
from quality.rows import Row  # noqa: E402
from quality.sources import ROOT, Sources  # noqa: E402
from quality.study import STUDIES, TYPED, Study  # noqa: E402
from quality.variants import Line, typed, variant  # noqa: E402
from sparsiattn.kernels import compile_native  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsiattn" / "wheels"
Lines = list[tuple[Row, Line]]


def missing(stage: str, given: argparse.Namespace, model: str, **of: Any) -> Lines:
    """Lines that have no row yet, each behind what names its row."""
    study: Study = given.study
    lines = given.line or study.lines(model)
    named = [({"model": model, **of, "line": typed(line)}, line) for line in lines]
    return [pair for pair in named if given.again or not study.rows.has(stage, pair[0])]


def judge(subject: Subject, name: str, sources: Sources, given: argparse.Namespace) -> None:
    """Quality of every line, on one model with real weights."""
    study: Study = given.study
    photos = given.photos or study.photos
    lines = missing("quality", given, name, photos=photos)
    if not subject.real or not lines:
        return
    exam = Exam.of(subject, sources, photos, study.labelled)
    with variant(exam.model, {}) as made:
        dense = exam.features(made)
    for row, line in lines:
        study.rows.add("quality", row, measured(partial(exam.judge, dense), line))


def race(subject: Subject, name: str, sources: Sources, given: argparse.Namespace) -> None:
    """Time of every line, on one model."""
    study: Study = given.study
    for batch in subject.batches if study.batches else (1,):
        lines = missing("speed", given, name, batch=batch, threads=given.threads)
        if lines:
            model, images = subject.model(sources), subject.images(sources, batch)
        for row, line in lines:
            rounds = given.rounds or study.rounds
            run = partial(speed.measure, model, images, rounds)
            study.rows.add("speed", row, measured(run, line))


def measured(measure: Callable[[Line], Row], line: Line) -> Row:
    """Figures of a line, or why the model refuses it."""
    try:
        return measure(line)
    except sparsiattn.SparsiattnError as error:
        return {"refused": str(error).splitlines()[0]}


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
    parser.add_argument("--study", choices=STUDIES, help="many lines; see quality/study.py")
    parser.add_argument("--photos", type=int, help="how many; the study's own number by default")
    parser.add_argument("--rounds", type=int, help="paired runs; the study's own by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", action="store_true", help="measure also what has its row")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--wheels", type=Path, default=CACHE)
    given = parser.parse_args(arguments)
    if not (given.quality or given.speed):
        parser.error("say --quality, --speed or both")
    given.study = STUDIES.get(given.study, TYPED)
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
