"""Dense and patched side by side in the runtimes that people deploy with, on a CPU.

``python benchmarks/runtimes.py --shared DIR --wheels DIR``, alone on the machine; rows that were
measured before, and did not fail, are kept without ``--again``. A runtime that is not installed
is left out by name. Beside torch it takes
``pip install onnx onnxscript onnxruntime openvino nncf torchao``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from common import RESULTS, write
from quality.models import SUBJECTS
from quality.sources import ROOT, Sources
from runtime_programs import RUNTIMES, Pair, missing, versions
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.runtime.timing import alternate

NAME, LINE = "runtimes-cpu", {"strategy": "connectivity", "k": 0.1}
CASES = {
    "deit-s-224, batch 1": ("deit-s-224", 1),
    "deit-s-224, batch 8": ("deit-s-224", 8),
    "s14-518, batch 1": ("s14-518", 1),
    "vit-s-1024, batch 1": ("vit-s-1024", 1),
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsiattn" / "wheels"


class Both(nn.Module):
    """A timm model with the tokens of its last norm beside its output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens), tokens


def cosines(found: list[Tensor], known: list[Tensor]) -> dict[str, float]:
    """Of outputs, and the mean over patch tokens, with what dense float32 gives."""
    named = zip(("output", "tokens"), found, known, strict=True)
    return {
        name: round(F.cosine_similarity(a.double(), b.double(), dim=-1).mean().item(), 5)
        for name, a, b in named
    }


def timing(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Quartiles of the ratios of each round, and medians."""
    took = alternate(calls, rounds)
    pairs = zip(took["dense"], took["patched"], strict=True)
    low, middle, high = quantiles([dense / patched for dense, patched in pairs], n=4)
    medians = {f"{name}_ms": round(1e3 * quantiles(s, n=4)[1], 2) for name, s in took.items()}
    return {
        **medians, "rounds": rounds,
        "ratio": round(middle, 3), "ratio_quartiles": [round(low, 3), round(high, 3)],
    }  # fmt: skip


def row(pair: Pair, runtime: str, known: list[Tensor], rounds: int) -> dict[str, Any]:
    """One runtime on one model, or why there is no figure."""
    lacks = missing(runtime)
    if lacks:
        return {"left_out": f"not installed: {', '.join(lacks)}"}
    start = time.perf_counter()
    try:
        calls = {side: RUNTIMES[runtime].make(pair, side) for side in ("dense", "patched")}
        outputs = {side: call() for side, call in calls.items()}
        made = time.perf_counter() - start
        quality = {side: cosines(found, known) for side, found in outputs.items()}
        return {**timing(calls, rounds), "cosine": quality, "seconds_to_make": round(made, 1)}
    except Exception as error:  # every runtime and compiler has errors of its own
        text = (str(error).strip().splitlines() or [""])[0]
        return {"failed": f"{type(error).__name__}: {text[:300]}"}


def measure(case: str, wanted: list[str], given: argparse.Namespace, rows: dict[str, Any]) -> None:
    """All runtimes of one model and batch size."""
    name, batch = CASES[case]
    subject, sources = SUBJECTS[name], Sources(given.shared, given.wheels)
    torch.manual_seed(0)
    model, images = Both(subject.model(sources)).eval(), subject.images(sources, batch)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        known = [x.clone() for x in model(images)]
        pair = Pair(model, images, LINE, Path(folder), given.threads)
        for runtime in wanted:
            real = {"real_weights": subject.real}
            rows[f"{case}, {runtime}"] = {**real, **row(pair, runtime, known, given.rounds)}
            print(case, runtime, rows[f"{case}, {runtime}"], flush=True)
            write(NAME, {"line": LINE, "versions": versions(), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--again", action="store_true", help="measure also what has its row")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--wheels", type=Path, default=CACHE)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = RESULTS / f"{NAME}.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for case in given.cases:
        wanted = [
            one
            for one in given.runtimes
            if given.again or "ratio" not in rows.get(f"{case}, {one}", {})
        ]
        if wanted:
            measure(case, wanted, given, rows)


if __name__ == "__main__":
    main()
