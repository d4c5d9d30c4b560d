"""Accuracy of every method by one protocol, on a plain timm ViT trained on CIFAR-10.

``python benchmarks/accuracy --data DIR`` where ``DIR`` holds ``cifar10-train.tar`` and
``cifar10-test.tar``; the weights are ``benchmarks/weights/cifar-vit.safetensors``
(`benchmarks/cifar.py`). Rows that were measured before are not measured again; ``--only`` takes
a glob over their names, ``--not`` one over those to leave out, so that several processes can share
the work (`OMP_NUM_THREADS=1` each). ``--speed`` times what needs no fit, alone on the machine.
Hours on two cores.
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
from common import write  # noqa: E402
from fit import BenchResult  # noqa: E402
from measure import Protocol  # noqa: E402
from methods import Method, methods  # noqa: E402
from summary import claims, over_seeds  # noqa: E402

ROWS, SPEEDS = "rows.jsonl", "speeds.jsonl"


def so_far(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row.pop("name"): row for row in map(json.loads, lines)}


def measure(bench: BenchResult, protocol: Protocol, chosen: list[Method], speed: bool) -> None:
    """A line for every method that has none yet."""
    path = bench.work / (SPEEDS if speed else ROWS)
    done = so_far(path)
    for method in chosen:
        if method.name in done:
            continue
        with bench.patched(method) as model:
            if model is None:
                continue
            found = protocol.speed(model) if speed else asdict(method) | protocol.measure(model)
        with path.open("a") as file:
            file.write(json.dumps({"name": method.name, **found}) + "\n")
        print(method.name, found.get("top1", found.get("ratio")), flush=True)


def choose(only: str, without: str, speed: bool) -> list[Method]:
    named = [m for m in methods() if fnmatch.fnmatch(m.name, only)]
    found = [m for m in named if not fnmatch.fnmatch(m.name, without)]
    return [m for m in found if m.fit == "none" and m.strategy != "dense"] if speed else found


def summarise(work: Path, images: int) -> None:
    rows = over_seeds(so_far(work / ROWS))
    for name, speed in so_far(work / SPEEDS).items():
        rows[name]["speed"] = speed
    write("accuracy-cifar", {"images": images, "rows": rows, "claims": claims(rows)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=cifar.WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("accuracy-work"), help="of rows and fits")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--only", default="*")
    parser.add_argument("--not", dest="without", default="")
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    given.work.mkdir(exist_ok=True)
    images, labels = cifar.read(given.data / "cifar10-test.tar")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pick = order[: given.images]
    protocol = Protocol.of(cifar.load(given.weights), images[pick], labels[pick])
    bench = BenchResult(given.weights, *cifar.read(given.data / "cifar10-train.tar"), given.work)
    measure(bench, protocol, choose(given.only, given.without, given.speed), given.speed)
    summarise(given.work, len(pick))


if __name__ == "__main__":
    main()
