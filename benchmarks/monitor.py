"""What `Patch.monitor` costs: a watched call, and one that is only counted, over one without a
monitor. ``python benchmarks/monitor.py``"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import paired, write

import sparsiattn

CASES = (("topk", 1), ("topk", 16), ("local", 1), ("connectivity", 1))
ONLY_COUNTED = 10**9


def forward(patch: sparsiattn.Patch, images: torch.Tensor, every: int) -> Callable[[], Any]:
    """A call of the model, the first of a monitor that watches every so many; 0 for none."""

    def call() -> Any:
        if not every:
            return patch.model(images)
        with patch.monitor(every):
            if every == ONLY_COUNTED:
                patch.active_monitor.begin()  # the first call would be watched
            return patch.model(images)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", sparsiattn.SlowerThanDense)
    rows = []
    for strategy, batch in CASES:
        model = timm.create_model(options.model).eval()
        images = torch.randn(batch, *model.pretrained_cfg["input_size"])
        with sparsiattn.patch(model, strategy, k=0.25) as patch, torch.inference_mode():
            plain = forward(patch, images, 0)
            watched = paired(plain, forward(patch, images, 1), options.rounds)
            counted = paired(plain, forward(patch, images, ONLY_COUNTED), options.rounds)
        # what is not watched is counted, which takes less than these runs can tell
        share = (watched["ratio"] - 1) / 100
        row = {"strategy": strategy, "batch": batch, "watched": watched, "counted": counted}
        rows.append(row | {"share_at_every_100": round(share, 5)})
        print(rows[-1], flush=True)
    write("monitor-cpu", {"model": options.model, "over_a_call_without_a_monitor": rows})


if __name__ == "__main__":
    main()
