"""Searched schedules against the best uniform ones, on the CIFAR-10 model: found on training images
without labels, judged on test images that the search never saw.

``python benchmarks/search.py --data DIR``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cifar
import torch
from common import write
from torch import Tensor, nn

import sparsiattn

BUDGETS = (("hybrid", 0.8), ("hybrid", 0.65), ("token_drop", 0.65))


def judged(
    model: nn.Module, test: tuple[Tensor, Tensor], dense: Tensor, strategy: str, schedule: Any,
    options: Any,
) -> dict[str, float]:  # fmt: skip
    """Top-1 and agreement with the dense model, per cent, and MACs, on the test images."""
    with (
        sparsiattn.patch(model, strategy, schedule=schedule, **options) as live,
        torch.inference_mode(),
    ):
        said = torch.cat([model(cifar.normalise(x)).argmax(-1) for x in test[0].split(250)])
        macs = live.report().macs
    return {
        "top1": round(100 * (said == test[1]).double().mean().item(), 2),
        "agreement": round(100 * (said == dense).double().mean().item(), 2),
        "macs": float(macs or 0),
    }


def row(
    model: nn.Module, images: Tensor, test: tuple[Tensor, Tensor], dense: Tensor, strategy: str,
    share: float, trials: int | None,
) -> dict[str, Any]:  # fmt: skip
    found = sparsiattn.search(
        model, list(cifar.normalise(images).split(128)), {"macs": share}, strategy=strategy,
        trials=trials,
    )  # fmt: skip
    assert found.uniform is not None
    print(found, flush=True)
    result: dict[str, Any] = {
        "strategy": strategy, "budget": share, "schedule": found.schedule,
        "macs_dense": found.macs_dense, "uniform_shares": found.uniform_shares,
        "options": found.options, "uniform_options": found.uniform_options,
        "trials": found.trials,
    }  # fmt: skip
    result["searched"] = judged(model, test, dense, strategy, found.schedule, found.options)
    result["uniform"] = judged(
        model, test, dense, strategy, found.uniform_schedule, found.uniform_options
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=cifar.WEIGHTS)
    parser.add_argument("--images", type=int, default=512, help="to search with")
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--trials", type=int, default=None, help="in all; see search()")
    given = parser.parse_args()
    model = cifar.load(given.weights)
    generator = torch.Generator().manual_seed(0)
    train, labels = cifar.read(given.data / "cifar10-train.tar")
    images = train[torch.randperm(len(labels), generator=generator)[: given.images]]
    test_images, test_labels = cifar.read(given.data / "cifar10-test.tar")
    pick = torch.randperm(len(test_labels), generator=generator)[: given.test]
    test = test_images[pick], test_labels[pick]
    with torch.inference_mode():
        dense = torch.cat([model(cifar.normalise(x)).argmax(-1) for x in test[0].split(250)])
    rows = [
        row(model, images, test, dense, strategy, share, given.trials)
        for strategy, share in BUDGETS
    ]
    top1 = round(100 * (dense == test[1]).double().mean().item(), 2)
    about = {"searched_on": len(images), "images": len(pick), "dense_top1": top1}
    write("search-cifar", {**about, "rows": rows})


if __name__ == "__main__":
    main()
