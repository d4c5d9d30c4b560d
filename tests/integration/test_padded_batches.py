"""Images of different sizes padded to one length: padding is nobody's key and never a token."""

from __future__ import annotations

from typing import Any

import pytest
import sparsiattn
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = [(8, 8), (4, 6), (3, 9)]
INFOS = sparsiattn.list_strategies()
ATTENTION = [name for name, info in INFOS.items() if info.kind != "tokens"]
TOKENS = [name for name, info in INFOS.items() if info.kind == "tokens"]


def naflex(pool: str = "token", **options: Any) -> NaFlexVit:
    torch.manual_seed(0)
    cfg = NaFlexVitCfg(
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        class_token=pool == "token",
        reg_tokens=0,
        pos_embed_grid_size=(8, 8),
        global_pool=pool,
        **options,
    )
    return NaFlexVit(cfg, num_classes=10).eval()


def images(sizes: list[tuple[int, int]] = SIZES) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "patches": torch.randn(rows * columns, 192, generator=generator),
            "patch_coord": torch.cartesian_prod(torch.arange(rows), torch.arange(columns)),
            "patch_valid": torch.ones(rows * columns, dtype=torch.bool),
        }
        for rows, columns in sizes
    ]


def batch(parts: list[dict[str, Tensor]], length: int = 0) -> dict[str, Tensor]:
    """The images in one batch, padded with noise that no result may depend on."""
    length = max(length, *(len(part["patches"]) for part in parts), 0)
    out: dict[str, list[Tensor]] = {}
    for part in parts:
        missing = length - len(part["patches"])
        noise = torch.randn(missing, 192, generator=torch.Generator().manual_seed(missing))
        out.setdefault("patches", []).append(torch.cat([part["patches"], 9 * noise]))
        for name, value in (("patch_coord", 0), ("patch_valid", False)):
            shape = (missing, *part[name].shape[1:])
            rest = torch.full(shape, value, dtype=part[name].dtype)
            out.setdefault(name, []).append(torch.cat([part[name], rest]))
    return {name: torch.stack(values) for name, values in out.items()}


def patched(model: nn.Module, strategy: Any, **options: Any) -> Any:
    return sparsiattn.patch(model, strategy, input=(1, 3, 64, 64), **options)


def check_padding_is_nothing(model: nn.Module, strategy: Any, **options: Any) -> None:
    """The same logits alone, and in batches padded to two other lengths."""
    parts = images()
    with torch.no_grad(), patched(model, strategy, **options):
        alone = torch.cat([model(batch([part])) for part in parts])
        for length in (64, 81):
            torch.testing.assert_close(model(batch(parts, length)), alone, rtol=1e-5, atol=1e-5)
        small = model(batch(parts[1:], 30))
    torch.testing.assert_close(small, alone[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_keys_do_not_depend_on_padding(name: str) -> None:
    check_padding_is_nothing(naflex(), name, only_if_faster=False)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_do_not_depend_on_padding(name: str) -> None:
    check_padding_is_nothing(naflex(), name)
