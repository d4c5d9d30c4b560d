"""Accuracy of every method by one protocol, on a plain timm ViT trained on CIFAR-10.

``python benchmarks/accuracy --data DIR`` where ``DIR`` holds ``cifar10-train.tar`` and
``cifar10-test.tar``; the weights are ``benchmarks/weights/cifar-vit.safetensors``
(`benchmarks/cifar.py`). Rows that are already in the JSON are not measured again; ``--only`` takes
a glob over their names. Hours on two cores, most of them for rows that say ``trained``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import cifar  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, write  # noqa: E402
from fit import Bench  # noqa: E402
from measure import Protocol  # noqa: E402
from methods import methods  # noqa: E402
from summary import claims, over_seeds  # noqa: E402

WEIGHTS = HERE.parent / "weights" / "cifar-vit.safetensors"
ROWS = RESULTS / "accuracy-rows.jsonl"


def rows_so_far() -> dict[str, dict[str, Any]]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {row.pop("name"): row for row in map(json.loads, lines)}


def measure(bench: Bench, protocol: Protocol, only: str) -> None:
    done = rows_so_far()
    for method in methods():
        if method.name in done or not fnmatch.fnmatch(method.name, only):
            continue
        with bench.patched(method) as model:
            row = {"name": method.name, **asdict(method), **protocol.measure(model)}
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(method.name, row["top1"], row["agreement"], flush=True)


def summarise(images: int) -> None:
    rows = over_seeds(rows_so_far())
    write("accuracy-cifar", {"images": images, "rows": rows, "claims": claims(rows)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--work", type=Path, default=Path("accuracy-work"), help="fits are kept here"
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--only", default="*")
    given = parser.parse_args()
    torch.manual_seed(0)
    given.work.mkdir(exist_ok=True)
    images, labels = cifar.read(given.data / "cifar10-test.tar")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pick = order[: given.images]
    protocol = Protocol.of(cifar.load(given.weights), images[pick], labels[pick])
    bench = Bench(given.weights, *cifar.read(given.data / "cifar10-train.tar"), given.work)
    measure(bench, protocol, given.only)
    summarise(len(pick))


if __name__ == "__main__":
    main()
