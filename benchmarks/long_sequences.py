"""``python benchmarks/long_sequences.py``: whole encoders with thousands of tokens, random weights.

Each case runs in a process of its own, which makes its row: the dense model, the patched one, and
the limit (scaled dot-product attention that returns its values at once) in the same rounds. Deep
models are cut to a third of their blocks, all of the same size, so that a round takes less than a
minute on two cores; the share of blocks that is patched stays. ``peak_gb`` is the largest memory of
the process, dense runs included. Rows that are there already are kept without ``--again``.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import timm
import torch
from memory import _status
from quality.speed import without_attention
from torch import nn

import sparsiattn
from sparsiattn.runtime.timing import Timing, alternate

FILE = "long-sequences"


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        make: The model and the keyword arguments of its call.
        options: Of `patch`.
        about: What it stands for.
        shown: The options, as text where they are a function.
        rounds: Rounds of the three.
    """

    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    options: dict[str, Any]
    about: str
    shown: str = ""
    rounds: int = 3


def _timm(name: str, size: int) -> tuple[nn.Module, dict[str, Any]]:
    return timm.create_model(name, img_size=size), {"x": torch.randn(1, 3, size, size)}


def _vjepa() -> tuple[nn.Module, dict[str, Any]]:
    """V-JEPA 2 ViT-L at 64 frames of 256 pixels, 8 of its 24 blocks, without the predictor."""
    import transformers

    config = transformers.VJEPA2Config(
        hidden_size=1024, num_attention_heads=16, num_hidden_layers=8, crop_size=256,
        frames_per_clip=64, pred_num_hidden_layers=1,
    )  # fmt: skip
    video = torch.randn(1, 64, 3, 256, 256)
    return transformers.VJEPA2Model(config), {"pixel_values_videos": video, "skip_predictor": True}


def _qwen3_vl() -> tuple[nn.Module, dict[str, Any]]:
    """The tower of Qwen3-VL: heads of 72, 4,096 patches of one image, 9 of 27 blocks."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(depth=9, deepstack_visual_indexes=[2, 5], out_hidden_size=1152)
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    grid = torch.tensor([[1, 64, 64]])
    return Qwen3VLVisionModel(config), {
        "hidden_states": torch.randn(4096, values),
        "grid_thw": grid,
    }


def _first_three_quarters(site: sparsiattn.Site) -> float:
    return 0.25 if site.index < 0.75 * site.depth else 1.0


CASES = {
    "dinov3-s-1024": Case(
        partial(_timm, "vit_small_patch16_dinov3", 1024), {"k": 0.1},
        "DINOv3 ViT-S/16 at 1024 px", rounds=9,
    ),
    "dinov3-b-1536": Case(
        partial(_timm, "vit_base_patch16_dinov3", 1536), {"k": 0.1}, "DINOv3 ViT-B/16 at 1536 px"
    ),
    "qwen3-vl-4096": Case(
        _qwen3_vl, {"k": 0.1}, "Qwen3-VL tower, 64 x 64 patches, 9 of 27 blocks"
    ),
    "vjepa2-l-8192": Case(
        _vjepa, {"k": _first_three_quarters},
        "V-JEPA 2 ViT-L, 64 frames of 256 px, 8 of 24 blocks",
        "k=0.25 in the first three quarters of the blocks",
    ),
}  # fmt: skip


@torch.inference_mode()
def measure(name: str) -> dict[str, Any]:
    """The row of a case."""
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.make()
    model.eval()
    other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    patch = sparsiattn.patch(other, "connectivity", **case.options, input=inputs)
    other(**inputs)

    calls = {
        "dense": lambda: model(**inputs),
        "patched": lambda: other(**inputs),
        "limit": lambda: without_attention(model, **inputs),
    }
    times = alternate(calls, case.rounds)
    sites = [site for site in patch.report().sites if site.ran]
    row = {"case": name, "about": case.about, "tokens": patch.sites[0].tokens}
    row["line"] = case.shown or ", ".join(f"{k}={v}" for k, v in case.options.items())
    row |= Timing.of(times["patched"], times["dense"]).to_dict()
    row["limit"] = Timing.of(times["limit"], times["dense"]).to_dict()["ratio"]
    row["structure"] = str(patch.sites[0].structure)
    row["kernels"] = sorted({site.kernel for site in sites if site.kernel})
    return {**row, "peak_gb": round(_status("VmHWM") / 1e9, 2), "made": common.made()}


def _in_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--row", name]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--row", choices=list(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(given.row)))
        return
    path = common.RESULTS / f"{FILE}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in given.cases:
        if any(row["case"] == name for row in rows) and not given.again:
            continue
        rows = [row for row in rows if row["case"] != name] + [_in_process(name)]
        print(rows[-1], flush=True)
        common.write(FILE, {"rows": rows})


if __name__ == "__main__":
    main()
