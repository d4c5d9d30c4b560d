"""Whole models whose attention has a bias, a mask, windows or half precision, in compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn

pytestmark = pytest.mark.usefixtures("compiled_native")
timm = pytest.importorskip("timm")

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
WINDOWS: dict[str, Any] = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}
MODELS = {
    "swin_tiny_patch4_window7_224": {**WINDOWS, "img_size": 112},
    "swinv2_tiny_window8_256": {**WINDOWS, "img_size": 128},
    "beit_base_patch16_224": {**SMALL, "img_size": 160},
    "vit_relpos_medium_patch16_224": {**SMALL, "img_size": 160},
    "samvit_base_patch16_224": {
        **SMALL, "img_size": 160, "window_size": 5, "global_attn_indexes": (1,),
    },
    "vit_small_patch16_224": {**SMALL, "img_size": 160, "num_classes": 10},
}  # fmt: skip


def model(name: str) -> tuple[nn.Module, Tensor]:
    """With weights at which attention and its bias matter."""
    torch.manual_seed(0)
    options = MODELS[name]
    host = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for key, weight in host.named_parameters():
            if "rel" in key:
                weight.normal_(std=1.0)
            elif "qkv" in key:
                weight.normal_(std=0.2)
            elif (weight.dim() == 1 and "weight" in key) or "gamma" in key:
                weight.fill_(1.0)
    return host, torch.randn(2, 3, options["img_size"], options["img_size"])


@pytest.mark.parametrize("tile", [1, (4, 2)], ids=["rows", "tiles"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_native_gives_what_the_reference_does(name: str, tile: object) -> None:
    host, images = model(name)
    found = {}
    for kernel in ("native", "reference"):
        # under a shifted window's mask, means of tiles would differ between queries
        masked = name.startswith("swin") and tile != 1
        options = {"k": 0.2, "tile": tile, "background": None if masked else "auto"}
        with sparsiattn.patch(host, "connectivity", kernel=kernel, **options):  # type: ignore[arg-type]
            found[kernel] = host.forward_features(images)
    dense = host.forward_features(images)
    torch.testing.assert_close(found["native"], found["reference"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found["native"], dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tile", [1, (4, 2)], ids=["rows", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "beit_base_patch16_224"])
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype, tile: object) -> None:
    host, images = model(name)
    options = {"k": 0.2, "tile": tile, "kernel": "native"}
    with sparsiattn.patch(host, "connectivity", **options):  # type: ignore[arg-type]
        exact = host.forward_features(images)
        found = host.to(dtype).forward_features(images.to(dtype))
    assert found.dtype == dtype
    error = (found.float() - exact).norm() / exact.norm()
    assert error < 0.05
