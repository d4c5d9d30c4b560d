"""Every registered strategy as exported programs, compared with the model that they came from.

``python benchmarks/export.py``; rows that were made before are not made again (``--work``),
``--formats`` and ``--only`` (a glob over strategies) choose. AOTInductor compiles for half a minute
each.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write

import sparsiattn
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.testing.hosts import tiny_vit

BUDGETS = {"attention": {"k": 0.25}, "tokens": {"keep": 0.6}, "both": {"k": 0.25, "keep": 0.6}}
SUFFIX = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}


def row(strategy: str, format: str, **more: Any) -> dict[str, Any]:
    """Largest difference of outputs to the eager model's, or why it is refused."""
    takes = REGISTRY.get("strategies", strategy).option_names()
    budget = BUDGETS[sparsiattn.list_strategies()[strategy].kind]
    options = {name: value for name, value in budget.items() if name in takes} | more
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIX[format]}"
        try:
            sparsiattn.patch(model, strategy, only_if_faster=False, **options)
            found = sparsiattn.export(model, images, path, format)
        except sparsiattn.SparsiattnError as error:
            return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "max_difference": found.max_difference, "batches": found.batches,
        "dynamic_batch": found.dynamic_batch, "kernels": found.kernels,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("export-work.jsonl"))
    parser.add_argument("--only", default="*")
    parser.add_argument("--formats", nargs="+", default=["pt2", "onnx", "aoti"], choices=SUFFIX)
    given = parser.parse_args()
    lines = given.work.read_text().splitlines() if given.work.exists() else []
    rows: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)
    wanted: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in sparsiattn.list_strategies()]
    wanted += [("ats", {"static": True}), ("token_drop", {"keep": "adaptive"})]
    for format in given.formats:
        for strategy, more in wanted:
            name = ", ".join([strategy, *(f"{k}={v}" for k, v in more.items()), format])
            if name in rows or not fnmatch.fnmatch(strategy, given.only):
                continue
            torch.manual_seed(0)
            rows[name] = row(strategy, format, **more)
            with given.work.open("a") as file:
                file.write(json.dumps([name, rows[name]]) + "\n")
            print(name, rows[name], flush=True)
    write("export-cpu", {"rows": rows})


if __name__ == "__main__":
    main()
