"""Same seed, same bits: within a process, in other processes, and how far a batch moves an image.

Processes get hash seeds of their own, so that the order of a set cannot decide anything, and one
tuning file that was measured before them: ``auto`` may choose any kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsiattn
from reliability.drawn import names
from reliability.hosts import Host, build

BATCH = 8


def run(processes: int = 3, strategies: int | None = None) -> dict[str, Any]:
    """Digests of every strategy's output in this and other processes, and the largest relative
    difference between an image alone and in a batch of `BATCH`."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "SPARSIATTN_CACHE": cache}
        tune = [sys.executable, "-m", "sparsiattn", "tune"]
        subprocess.run(tune, env=_paths(env), capture_output=True, check=True)
        found = [_elsewhere(env, seed, strategies) for seed in range(processes)]
    rows = found[0]
    differ = [name for name in rows if any(one[name]["sha256"] != rows[name]["sha256"]
              for one in found)]  # fmt: skip
    twice = [name for name, row in rows.items() if not row["again"]]
    apart = {name: row["batch"] for name, row in rows.items()}
    return {
        "strategies": len(rows), "processes": processes, "batch": BATCH,
        "differ_between_processes": differ, "differ_within_one": twice,
        "largest_batch_difference": max(apart.values()), "batch_difference": apart,
    }  # fmt: skip


def _elsewhere(env: dict[str, str], seed: int, strategies: int | None) -> dict[str, Any]:
    shown = ["--strategies", str(strategies or 0)]
    command = [sys.executable, "-m", "reliability.determinism", *shown]
    env = {**_paths(env), "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _paths(env: dict[str, str]) -> dict[str, str]:
    here = Path(__file__).resolve().parent.parent
    path = [str(here), str(here.parent), str(here.parent / "backbones"), env.get("PYTHONPATH", "")]
    return {**env, "PYTHONPATH": os.pathsep.join(path)}


def digests(strategies: int | None) -> dict[str, Any]:
    """For every strategy (or the first so many): digest of its output, whether a second patch
    gives the same bits, and the difference between batches."""
    torch.set_num_threads(1)
    model = build(Host())
    x = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {name: _row(model, name, x) for name in names()[:strategies]}


def _row(model: nn.Module, name: str, x: torch.Tensor) -> dict[str, Any]:
    with sparsiattn.patch(model, name, only_if_faster=False):
        out, second = model(x), model(x)
        alone = torch.cat([model(one[None]) for one in x])
    with sparsiattn.patch(model, name, only_if_faster=False):
        third = model(x)
    return {
        "sha256": hashlib.sha256(out.numpy().tobytes()).hexdigest(),
        "again": torch.equal(out, second) and torch.equal(out, third),
        "batch": float((out - alone).abs().max() / out.abs().max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategies", type=int)
    print(json.dumps(digests(parser.parse_args().strategies or None)))
