"""What hosts call their heads, class tokens and tables: attributes that tell what a module is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sparsiattn.patching.discovery.probe import AttentionCall


def has_temperature(module: nn.Module) -> bool:
    """Cross-covariance attention (XCiT), which is no attention between tokens however computed."""
    return isinstance(getattr(module, "temperature", None), nn.Parameter)


def has_table(call: AttentionCall, name: str) -> bool:
    """Whether the module, a part of it or a parent holds this table of relative positions."""
    parts = (getattr(part, name, None) for part in call.module.children())
    return call.nearest(name) is not None or any(part is not None for part in parts)


def class_rows(module: nn.Module) -> int:
    """Class tokens that a module itself holds.

    Several may be in one parameter (PiT), or each branch may have its own (CrossViT).
    """
    kinds = ("cls_token", "class_token", "cls_token_0")
    held = (getattr(module, name, None) for name in kinds)
    return next((t.shape[1] for t in held if isinstance(t, torch.Tensor) and t.dim() == 3), 0)


def count_class_tokens(module: nn.Module) -> int:
    """CLS and distillation tokens held by this module itself, by the names in use.

    Args:
        module: The module.

    >>> vit = torch.nn.Module()
    >>> vit.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    >>> count_class_tokens(vit)
    1
    """
    kinds = (("cls_token", "class_token", "class_embedding"), ("distillation_token", "dist_token"))
    return sum(any(_is_tensor(module, name) for name in names) for names in kinds)


def _is_tensor(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), torch.Tensor)


def head_count(module: nn.Module) -> int | None:
    """Heads of an attention module, by the names in use."""
    for name in ("num_heads", "heads", "n_heads", "num_attention_heads"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def pair(side: int | Iterable[int]) -> tuple[int, int]:
    """Rows and columns of a size that may be one number for both."""
    rows, columns = (side, side) if isinstance(side, int) else side
    return rows, columns


def trained_side(model: nn.Module) -> int | None:
    """The side of the images that classifiers of torchvision were trained on, which none says."""
    home = type(model).__module__.split(".")
    classifies = home[:2] == ["torchvision", "models"] and len(home) == 3
    return 224 if classifies else None
