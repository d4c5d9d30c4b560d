"""Adapters for families of models. The first one that fits a model is used; `generic` is last."""

from __future__ import annotations

from sparsiattn import Backbone, hookimpl
from sparsiattn_backbones.families import Generic, Hiera, Sam, Swin, TimmViT
from sparsiattn_backbones.hosts import ClipViT, HuggingFace, TorchvisionViT


@hookimpl
def sparsiattn_backbones() -> list[Backbone]:
    families = (Hiera, Sam, Swin, TimmViT, TorchvisionViT, ClipViT, HuggingFace, Generic)
    return [family() for family in families]
