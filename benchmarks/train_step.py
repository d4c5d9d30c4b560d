"""One training step (forward, loss, backward) of a ViT-S at 518 pixels, dense and patched in paired
rounds on random weights. ``python benchmarks/train_step.py`` (alone on the machine)."""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import timm
import torch
from common import write
from torch import Tensor, nn

import sparsiattn
from sparsiattn.runtime.timing import Timing, alternate


def step(model: nn.Module, images: Tensor) -> None:
    """Gradients of all weights."""
    model.zero_grad(set_to_none=True)
    model(images).square().mean().backward()


def measure(name: str, rounds: int, k: float) -> dict[str, Any]:
    torch.manual_seed(0)
    dense = timm.create_model(name).train()
    images = torch.randn(1, *dense.pretrained_cfg["input_size"])
    sparse = copy.deepcopy(dense)
    patch = sparsiattn.patch(sparse, strategy="connectivity", k=k)
    calls = {"dense": partial(step, dense, images), "patched": partial(step, sparse, images)}
    times = alternate(calls, rounds)
    kernels = sorted({site.kernel for site in patch.report().sites if site.ran})
    timing = Timing.of(times["patched"], times["dense"]).to_dict()
    return {"model": name, "k": k, "batch": 1, "kernels": kernels, **timing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    rows = [measure(options.model, options.rounds, k) for k in (0.1, 0.25)]
    print(*rows, sep="\n")
    write("train-step-cpu", {"steps": rows})


if __name__ == "__main__":
    main()
