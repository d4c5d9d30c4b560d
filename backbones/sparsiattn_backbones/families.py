"""Adapters for timm's plain, Swin, SAM and Hiera models, and for any other model with SDPA."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsiattn import AttentionCall, Backbone, Grid, Pooling

POOLS: dict[str, Pooling] = {"token": "prefix", "avg": "avg", "max": "max"}


def _adds_class_late(model: nn.Module) -> bool:
    """Whether the class token is added after the main blocks, as in CaiT and XCiT."""
    late = ("blocks_token_only", "cls_attn_blocks")
    return any(getattr(part, name, None) is not None for part in model.modules() for name in late)


def _head_pooling(model: nn.Module) -> Pooling:
    """The pooling of a classifier head of timm."""
    head = getattr(model, "head", None)
    pool = getattr(head, "global_pool", head)  # Hiera's head itself has the pool_type
    return POOLS.get(str(getattr(pool, "pool_type", getattr(head, "pool_type", ""))), "other")


def _lacks(model: nn.Module, *attributes: str) -> list[str]:
    return [f"has no {name}" for name in attributes if getattr(model, name, None) is None]


class TimmViT(Backbone):
    """Plain ViTs of timm: ViT, DeiT, EVA, BEiT, DINOv2, DINOv3, NaFlex, rel-pos and hybrid ones."""

    name = "timm_vit"

    def why_not(self, model: nn.Module) -> list[str]:
        embed = "embeds" if hasattr(model, "embeds") else "patch_embed"  # NaFlexViT
        return _lacks(model, "blocks", embed, "num_prefix_tokens")

    def class_tokens(self, model: nn.Module) -> int:
        return 0 if _adds_class_late(model) else super().class_tokens(model)

    def pooling(self, model: nn.Module) -> Pooling:
        attending = getattr(model, "attn_pool", None) is not None or _adds_class_late(model)
        if attending or getattr(model, "pool_include_prefix", False):
            return "other"
        kind = getattr(model, "global_pool", "")
        if not getattr(model, "num_prefix_tokens", 0) and kind not in ("avg", "max"):
            return "other"  # special kinds of Gemma and Qwen
        if hasattr(model, "embeds"):
            return POOLS.get(kind, "other")  # NaFlexViT pools with its mask, in a function
        if kind not in ("", "avg") and not hasattr(model, "pool"):
            return "prefix"  # BEiT and ViT with relative positions: average or first token
        return POOLS.get(kind, "other")


class _PatchesOnly(Backbone):
    """Families whose sequences contain only patch tokens."""

    def prefix_tokens(self, call: AttentionCall) -> int:
        return 0

    def class_tokens(self, model: nn.Module) -> int:
        return 0


class Swin(_PatchesOnly):
    """Swin, v2 and v2-CR: attention in windows of fixed size, every second block shifted."""

    name = "timm_swin"

    def why_not(self, model: nn.Module) -> list[str]:
        missing = _lacks(model, "stages" if hasattr(model, "stages") else "layers", "patch_embed")
        tables = ("relative_position_bias_table", "cpb_mlp", "meta_mlp")
        if missing or any(hasattr(m, name) for m in model.modules() for name in tables):
            return missing
        return ["no module has relative positions of windows (" + ", ".join(tables) + ")"]

    def pooling(self, model: nn.Module) -> Pooling:
        return _head_pooling(model)

    def grid(self, call: AttentionCall, n: int, aspect: float) -> Grid:
        window: Any = call.module.window_size
        rows, columns = window
        return (rows, columns) if rows * columns == n else super().grid(call, n, aspect)


class Sam(_PatchesOnly):
    """SAM's image encoder: windows and global blocks, decomposed relative positions."""

    name = "timm_sam"

    def why_not(self, model: nn.Module) -> list[str]:
        missing = _lacks(model, "blocks", "patch_embed", "neck")
        if missing or any(hasattr(module, "rel_pos_h") for module in model.modules()):
            return missing
        return ["no module has a rel_pos_h"]


class Hiera(_PatchesOnly):
    """Hiera: tokens in mask units in unrolled order; queries are pooled between stages."""

    name = "timm_hiera"

    def why_not(self, model: nn.Module) -> list[str]:
        return _lacks(model, "blocks", "unroll", "patch_embed", "tokens_spatial_shape")

    def input_shape(self, model: Any) -> tuple[int, ...] | None:
        embed, tokens = model.patch_embed, model.tokens_spatial_shape
        sides = (n * stride for n, stride in zip(tokens, embed.proj.stride, strict=True))
        return (1, embed.proj.in_channels, *sides)

    def pooling(self, model: nn.Module) -> Pooling:
        return _head_pooling(model)

    def grid(self, call: AttentionCall, n: int, aspect: float) -> Grid:
        return 1, n

    def is_raster_order(self, call: AttentionCall) -> bool:
        return False


class Generic(Backbone):
    """Any model whose attention calls scaled dot product attention."""

    name = "generic"

    def why_not(self, model: nn.Module) -> list[str]:
        return []

    def class_tokens(self, model: nn.Module) -> int:
        # older timm's CaiT and XCiT have no num_prefix_tokens, so that TimmViT does not take them
        return 0 if _adds_class_late(model) else super().class_tokens(model)

    def pooling(self, model: nn.Module) -> Pooling:
        for family in (Hiera(), Sam(), Swin(), TimmViT()):
            part = sole_part(model, family)
            if part is not model and not family.why_not(part):
                return family.pooling(part)
        return "other"


def sole_part(model: nn.Module, adapter: Backbone) -> nn.Module:
    """The only element of nested `nn.Sequential` that an adapter fits; else the model itself."""
    while isinstance(model, nn.Sequential):
        fitting = [part for part in model if not adapter.why_not(part)]
        nested = [part for part in model if isinstance(part, nn.Sequential)]
        if len(fitting or nested) != 1:
            break
        model = (fitting or nested)[0]
    return model
