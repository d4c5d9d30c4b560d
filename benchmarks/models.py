"""Speed of the lines that people type on many models, at batch 1 on random weights: dense and
patched in paired rounds. ``python benchmarks/models.py`` (alone on the machine); rows that are
there already are kept without ``--again``."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import warnings
from functools import partial
from typing import Any

import common
import timm
import torch

import sparsiattn
from sparsiattn.runtime.timing import Timing, alternate

FILE = "models-cpu"
PLAIN = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_384",
    "vit_small_r26_s32_384",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "eva02_small_patch14_336",
    "beit_base_patch16_384",
    "vit_relpos_medium_patch16_224",
    "vit_base_patch16_siglip_256",
    "vit_base_patch16_siglip_384",
    "samvit_base_patch16_512",
    "samvit_base_patch16_1024",
    "cait_s24_384",
    "xcit_small_12_p16_224",
)
WINDOWED = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "hiera_small_224",
    "mvitv2_tiny",
    "levit_256",
    "pvt_v2_b2",
)
NAMES = {
    f"samvit_base_patch16_{size}": ("samvit_base_patch16", {"img_size": size})
    for size in (512, 1024)
}
LINES: tuple[dict[str, Any], ...] = ({"k": 0.1}, {"k": 0.25}, {"k": 0.1, "only_if_faster": True})


@torch.inference_mode()
def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each budget."""
    torch.manual_seed(0)
    known, options = NAMES.get(name, (name, {}))
    model = timm.create_model(known, **options).eval()
    image = torch.randn(1, *model.pretrained_cfg["input_size"])
    if "img_size" in options:
        image = torch.randn(1, 3, options["img_size"], options["img_size"])
    rows = []
    for line in LINES:
        row = {"model": name, **line, "kind": "plain" if name in PLAIN else "windowed"}
        # the same memory of weights
        other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        try:
            patch = sparsiattn.patch(other, strategy="connectivity", **line)
        except sparsiattn.SparsiattnError as error:
            rows.append({**row, "refused": str(error).splitlines()[0]})
            continue
        other(image)
        calls = {"dense": partial(model, image), "patched": partial(other, image)}
        times = alternate(calls, rounds)
        rows.append({**row, **Timing.of(times["patched"], times["dense"]).to_dict()})
        rows[-1] |= {"cosine": _cosine(model, other, image)} | _about(patch.report())
    return rows


def _cosine(model: Any, other: Any, image: torch.Tensor) -> float:
    """Of the last features; weights are random, so it says little of trained ones."""
    dense, sparse = (x.forward_features(image).flatten(1) for x in (model, other))
    return round(torch.cosine_similarity(dense, sparse).mean().item(), 5)


def _about(report: sparsiattn.Report) -> dict[str, Any]:
    """What ran, by the report."""
    sites = [site for site in report.sites if site.ran]
    densities = [site.density for site in sites if site.density is not None]
    return {
        "sites": len(report.sites),
        "sparse_sites": len(sites),
        "kernels": sorted({site.kernel for site in sites}),
        "density": round(max(densities), 4) if densities else None,
        "expected": None if report.speed is None else round(report.speed, 3),
    }


def line_keys(row: dict[str, Any]) -> list[str]:
    """What tells a model's rows apart."""
    return [key for key in ("model", "k", "only_if_faster") if key in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--models", nargs="+", default=[*PLAIN, *WINDOWED])
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", sparsiattn.SlowerThanDense)
    path = common.RESULTS / f"{FILE}.json"
    rows = json.loads(path.read_text())["models"] if path.exists() else []
    for name in options.models:
        if any(row["model"] == name for row in rows) and not options.again:
            continue
        found = [{**row, "made": common.made()} for row in measure(name, options.rounds)]
        rows = [row for row in rows if row["model"] != name] + found
        common.write(FILE, {"models": rows})
        for row in found:
            shown = (*line_keys(row), "ratio", "sparse_sites", "kernels", "refused")
            print({key: row.get(key) for key in shown}, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
