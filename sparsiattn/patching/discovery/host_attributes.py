"""Attribute names that hosts use for heads, class tokens and tables."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sparsiattn.patching.discovery.probe import AttentionCall


def has_temperature(module: nn.Module) -> bool:
    """Whether this is cross-covariance attention (XCiT), which is never between tokens."""
    return isinstance(getattr(module, "temperature", None), nn.Parameter)


def has_table(call: AttentionCall, name: str) -> bool:
    """Whether the module, a child or a parent has this table of relative positions."""
    parts = (getattr(part, name, None) for part in call.module.children())
    return call.nearest(name) is not None or any(part is not None for part in parts)


def class_rows(module: nn.Module) -> int:
    """Number of class tokens that are attributes of this module.

    One parameter may hold several (PiT), or each branch may have its own (CrossViT).
    """
    kinds = ("cls_token", "class_token", "cls_token_0")
    held = (getattr(module, name, None) for name in kinds)
    return next((t.shape[1] for t in held if isinstance(t, torch.Tensor) and t.dim() == 3), 0)


def count_class_tokens(module: nn.Module) -> int:
    """Number of CLS and distillation tokens that are attributes of this module, by known names.

    Args:
        module: The module.

    >>> vit = torch.nn.Module()
    >>> vit.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    >>> count_class_tokens(vit)
    1
    """
    kinds = (("cls_token", "class_token", "class_embedding"), ("distillation_token", "dist_token"))
    return sum(any(_is_tensor(module, name) for name in names) for names in kinds)


def known_class_tokens(model: nn.Module) -> int:
    """Number of class tokens of a model, at most as many as it has prefix tokens if it says so."""
    for module in model.modules():
        prefix = getattr(module, "num_prefix_tokens", None)
        if isinstance(prefix, int):
            counts = (count_class_tokens(child) for child in module.modules())
            return min(prefix, next(filter(None, counts), 0))
    held = (max(class_rows(module), count_class_tokens(module)) for module in model.modules())
    return max(held, default=0)


def _is_tensor(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), torch.Tensor)


def head_count(module: nn.Module) -> int | None:
    """Number of heads of an attention module, by known attribute names; None if it has none."""
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
    """Image size of torchvision's classifiers, which is not among their attributes; else None."""
    home = type(model).__module__.split(".")
    classifies = home[:2] == ["torchvision", "models"] and len(home) == 3
    return 224 if classifies else None
