"""What works where: the census of all models by name, and family x strategy x kernel.

``python benchmarks/support.py`` goes on with whatever rows are missing under ``results/census/``
and sums them up in ``results/support.json``, from which ``tables.py`` makes docs/support.md. Hours
on two cores; ``--matrix``, ``--census timm`` and ``--part 0/2`` run parts of it.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import RESULTS, write

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
ROWS = RESULTS / "census"
LISTS = ("timm", "torchvision", "transformers")


def helper(name: str) -> ModuleType:
    """A module that the tests share; the tests are not type-checked."""
    return importlib.import_module(f"tests.support.{name}")


def run_matrix(only: str, part: tuple[int, int]) -> None:
    """Append the cells of every family that has none yet."""
    families, matrix = (helper(name) for name in ("families", "matrix"))
    census = helper("census")
    path = ROWS / "matrix.jsonl"
    usable = [name for name, reason in matrix.kernels().items() if not reason]
    made = families.families()
    for family in fnmatch.filter(made, only)[part[0] :: part[1]]:
        if family in census.read(path):
            continue
        start = time.perf_counter()
        subject = matrix.subject(made[family]())
        cells = {column: matrix.cells(subject, column, usable) for column in matrix.COLUMNS}
        row = {"name": family, "model": subject.specimen.entry.name, "cells": cells}
        row["seconds"] = round(time.perf_counter() - start, 1)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(family, row["seconds"], [c for c, v in cells.items() if v["auto"] != "works"],
              flush=True)  # fmt: skip


def run_census(name: str, only: str, part: tuple[int, int]) -> None:
    census = helper("census")
    entries = [e for e in census.LISTS[name]() if fnmatch.fnmatch(e.name, only)]
    census.run(iter(entries[part[0] :: part[1]]), ROWS / f"{name}.jsonl")


def run_recent() -> None:
    """Keep the outcome of every host of 2025-26 and of every task head, and say the shares."""
    recent = helper("census_recent")
    hosts = helper("hosts_recent").HOSTS
    rows = {name: recent.outcomes(name, host) for name, host in hosts.items()}
    heads = {name: recent.outcomes(name, host) for name, host in recent.heads()}
    write("recent", {"hosts": rows, "heads": heads})
    for kind, part in (("hosts", rows), ("heads", heads)):
        print(kind, len(part), "connectivity {:.0%}, token strategies {:.0%}".format(
            *recent.shares(part)), flush=True)  # fmt: skip


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One list's counts, the names behind every refusal, what was left alone and missed."""
    attending = [row for row in rows if row.get("attention")]
    found: dict[str, Any] = {
        "models": len(rows),
        "with_attention": len(attending),
        # they attend from one class token alone, which is left dense unless its site is named
        "named": sum(row.get("named", False) for row in attending),
        "status": dict(Counter(row["status"] for row in rows)),
        "refused": _by(attending, lambda row: [row["reason"]] if "reason" in row else []),
        "failed": _by(rows, lambda row: row.get("faults", [])),
        "left": _by(attending, lambda row: row.get("left", [])),
        "missed": _by(attending, lambda row: row.get("missed", [])),
        "not_tokens": _by(rows, lambda row: row.get("not_tokens", [])),
    }
    return found


def _by(rows: list[dict[str, Any]], reasons: Any) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for reason in reasons(row):
            names[reason].append(row["name"])
    return dict(names)


def summarise() -> None:
    census, matrix = helper("census"), helper("matrix")
    counted = {name: totals(list(census.read(ROWS / f"{name}.jsonl").values())) for name in LISTS}
    rows = sorted(census.read(ROWS / "matrix.jsonl").values(), key=lambda row: row["name"])
    cells = {row["name"]: {"model": row["model"], "cells": row["cells"]} for row in rows}
    write("support", {"census": counted, "kernels": matrix.kernels(), "matrix": cells})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--census", choices=LISTS, action="append", help="run this list alone")
    parser.add_argument("--matrix", action="store_true", help="run the matrix alone")
    parser.add_argument("--recent", action="store_true", help="run hosts of 2025-26 and task heads")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    parser.add_argument("--only", default="*", help="glob over names of models or families")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th row from the i-th on")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ROWS.mkdir(parents=True, exist_ok=True)
    first, step = map(int, given.part.split("/"))
    if given.recent:
        run_recent()
    everything = not (given.matrix or given.census or given.summarise or given.recent)
    for name in LISTS if everything else given.census or []:
        run_census(name, given.only, (first, step))
    if given.matrix or everything:
        run_matrix(given.only, (first, step))
    if step == 1 and not given.recent:
        summarise()


if __name__ == "__main__":
    main()
