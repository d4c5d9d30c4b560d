"""Every registered strategy on whole models, dense and patched in paired runs.

``python benchmarks/speed.py``; rows that were measured before are not measured again (``--work``),
``--only`` takes a glob over the names of strategies.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import timm
import torch
from common import write

import sparsiattn
from sparsiattn.registry.registry import REGISTRY

CASES = {"224 px, batch 8": (224, 8), "512 px, batch 1": (512, 1)}
BUDGET = {"attention": {"k": 0.25}, "tokens": {"keep": 0.7, "ratio": 0.7}}
KINDS = {"attention": ["attention"], "tokens": ["tokens"], "both": ["attention", "tokens"]}


def row(strategy: str, size: int, batch: int, model: str, rounds: int) -> dict[str, Any]:
    """Median ratio of dense over patched time, its quartiles, and the MACs."""
    takes = REGISTRY.get("strategies", strategy).option_names()
    kind = sparsiattn.list_strategies()[strategy].kind
    budget = {k: v for part in KINDS[kind] for k, v in BUDGET[part].items()}
    options: dict[str, Any] = {name: value for name, value in budget.items() if name in takes}
    torch.manual_seed(0)
    made = timm.create_model(model, img_size=size, num_classes=10).eval()
    images = torch.randn(batch, 3, size, size)
    try:
        patch = sparsiattn.patch(made, strategy, input=images, **options)
        patch.warmup(images)
        found = sparsiattn.bench(made, images, rounds=rounds, sites=False)
    except sparsiattn.SparsiattnError as error:
        return {"refused": str(error).splitlines()[0]}
    return {
        "ratio": found.ratio, "quartiles": found.ratio_quartiles, "macs": found.report.macs,
        "macs_dense": found.report.macs_dense, "options": options,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("speed-work.jsonl"))
    parser.add_argument("--only", default="*")
    given = parser.parse_args()
    lines = given.work.read_text().splitlines() if given.work.exists() else []
    rows: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)
    for strategy in fnmatch.filter(sparsiattn.list_strategies(), given.only):
        for case, (size, batch) in CASES.items():
            name = f"{strategy}, {case}"
            if strategy != "dense" and name not in rows:
                rows[name] = row(strategy, size, batch, given.model, given.rounds)
                with given.work.open("a") as file:
                    file.write(json.dumps([name, rows[name]]) + "\n")
                print(name, rows[name], flush=True)
    write("speed-cpu", {"model": given.model, "rounds": given.rounds, "rows": rows})


if __name__ == "__main__":
    main()
