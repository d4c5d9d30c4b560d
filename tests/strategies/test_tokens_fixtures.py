"""Token strategies against the authors' own code: EViT and ToMe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from timm.models import VisionTransformer
from torch import Tensor, nn

import sparsiattn


def _load(path: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    sizes = {name: int(meta[name]) for name in ("img_size", "patch_size", "embed_dim", "depth")}
    model = VisionTransformer(**sizes, num_heads=int(meta["num_heads"]), num_classes=10).eval()
    weights = {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}
    model.load_state_dict(weights)
    return model, tensors, meta


@pytest.mark.parametrize(("name", "fuse"), [("logits.drop", False), ("logits.fuse", True)])
def test_evit(fixtures: Path, name: str, fuse: bool) -> None:
    model, tensors, _ = _load(fixtures / "evit-vit-n65.safetensors")
    options: dict[str, Any] = {"keep": [0.7, 0.5], "layers": [1, 3], "fuse": fuse}
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", **options):
        torch.testing.assert_close(model(tensors["x"]), tensors[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "r"), [("logits.r2", 2), ("logits.r5", 5), ("dense", 0)])
def test_tome(fixtures: Path, name: str, r: int) -> None:
    model, tensors, _ = _load(fixtures / "tome-vit-n65.safetensors")
    with torch.no_grad(), sparsiattn.patch(model, "token_merge", r=r):
        torch.testing.assert_close(model(tensors["x"]), tensors[name], rtol=1e-4, atol=1e-4)
