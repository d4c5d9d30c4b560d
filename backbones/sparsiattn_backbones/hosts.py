"""Adapters for models outside timm: Hugging Face transformers, torchvision and CLIP.

None of these libraries is imported. A model is recognised by its attributes, also if it is part of
a larger model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn

from sparsiattn import (
    AttentionCall,
    AttributeOverride,
    Backbone,
    Grid,
    Layout,
    MetaInputs,
    PackedInput,
    Pooling,
    Site,
)
from sparsiattn_backbones import stems
from sparsiattn_backbones.families import sole_part

BIAS_TABLES = (
    *("relative_position_bias", "shared_position_bias", "relative_position_bias_table"),
    "continuous_position_bias_mlp",
)
"""Hugging Face's names of relative position biases, with one table for all windows of an image."""


class _StemFamily(Backbone):
    """Base of the families in this module, whose tokens are made in a stem."""

    def stem(self, model: nn.Module) -> nn.Module:
        return next(stems.stems(model), model)

    def image_module(self, model: nn.Module) -> nn.Module:
        # its first argument is the image, while the model may be called with keyword arguments
        layer = stems.patch_layer(self.stem(model))
        return model if stems.first_of(layer, nn.Conv2d) is None else layer

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        layer = stems.convolution(self.stem(model))
        return (1, 1) if layer is None else (layer.stride[-2], layer.stride[-1])

    def channels(self, model: nn.Module) -> int:
        """Number of channels of the model's images."""
        layer = stems.convolution(self.stem(model))
        return 3 if layer is None else layer.in_channels

    def prefix_tokens(self, call: AttentionCall) -> int:
        stem = stems.stem_of(call)
        return 0 if stem is None else stems.prefix_rows(stem)

    def class_tokens(self, model: nn.Module) -> int:
        return stems.class_rows(self.stem(model))

    def packs_batch(self, model: nn.Module) -> bool:
        return stems.packs(self.stem(model))


def _sides(size: Any) -> tuple[int, int] | None:
    """Rows and columns of a size that is an int or a pair; None for other forms."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


class HuggingFace(_StemFamily):
    """Hugging Face's vision models: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, BEiT and others."""

    name = "huggingface"

    def why_not(self, model: nn.Module) -> list[str]:
        reason = "no module has a config with an attention implementation"
        return [] if _configs(model) else [reason]

    def input_shape(self, model: nn.Module) -> tuple[int, ...] | None:
        stem: Any = self.stem(model)
        for config in _configs(model):
            sides = _sides(getattr(config, "image_size", getattr(config, "crop_size", None)))
            if sides is not None:
                count = stems.frames(stem, config)
                time = () if count is None else (count,)
                return (1, *time, getattr(config, "num_channels", self.channels(model)), *sides)
        if stems.takes_patches(stem):
            return (1, self.channels(model), *2 * (stem.position_embedding_size * stem.patch_size,))
        return super().input_shape(model)

    def attribute_overrides(self, model: nn.Module) -> list[AttributeOverride]:
        # one for each distinct configuration; modules read it in every forward pass
        switched = [c for c in _configs(model) if _unfused(vars(c)[IMPLEMENTATION])]
        fused = [
            AttributeOverride(c, IMPLEMENTATION, "sdpa", vars(c)[IMPLEMENTATION]) for c in switched
        ]
        # eager attention is not causal by default, but "sdpa" is unless is_causal is False
        not_causal = [
            AttributeOverride(m, "is_causal", False, ...) for m in _undirected(model, switched)
        ]
        return super().attribute_overrides(model) + fused + not_causal

    def meta_inputs(self, model: nn.Module, shape: tuple[int, ...]) -> MetaInputs:
        stem: Any = self.stem(model)
        if not stems.takes_patches(stem) or len(shape) != 4:
            args, kwargs = super().meta_inputs(model, shape)
            return args, {**kwargs, "skip_predictor": True} if _predicts(model) else kwargs
        grid = shape[-2] // stem.patch_size, shape[-1] // stem.patch_size
        flat = (1, math.prod(grid), stem.patch_embedding.in_features)
        (patches,), _ = super().meta_inputs(model, flat)
        sizes = torch.tensor([grid], device="cpu")  # read by the model's Python code
        return (), {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": sizes}

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        stem: Any = self.stem(model)
        return (stem.patch_size,) * 2 if stems.takes_patches(stem) else super().patch_size(model)

    def packs_batch(self, model: nn.Module) -> bool:
        return super().packs_batch(model) or any(map(stems.takes_packed, _configs(model)))

    def packed_input(self, model: nn.Module) -> PackedInput | None:
        rows = stems.module_taking(model, stems.ROW_SIZES)
        if rows is not None:
            return PackedInput(rows[0], sizes=rows[2], by_row=True)
        found = stems.module_taking(model, ("grid_thw",))
        if found is None:
            return None
        name, tower, _ = found
        side = getattr(getattr(tower, "config", None), "spatial_merge_size", None)
        merge = side if isinstance(side, int) else 1
        return PackedInput(name, merge=merge, window=stems.packed_window(tower, merge))

    def channels(self, model: nn.Module) -> int:
        stem: Any = self.stem(model)
        if not stems.takes_patches(stem):
            return super().channels(model)
        return int(stem.patch_embedding.in_features // stem.patch_size**2)

    def grid(self, call: AttentionCall, n: int, aspect: float) -> Grid:
        stem = stems.stem_of(call)
        if not self.is_raster_order(call) or stems.along_time(call):
            return 1, n
        time = 1 if stem is None else stems.steps(stem, call.nearest("config"))
        rows, columns = super().grid(call, n // time, aspect)
        return rows * time, columns  # frames of a video are stacked vertically

    def is_raster_order(self, call: AttentionCall) -> bool:
        return stems.in_raster_order(call, stems.stem_of(call))

    def bias(self, call: AttentionCall) -> Literal["none", "bias", "mask"]:
        kind = super().bias(call)
        if call.mask is None or call.mask[0] != 1 or call.mask_dtype == torch.bool:
            return kind  # Swin masks keys in shifted windows
        return "bias" if any(call.nearest(name) is not None for name in BIAS_TABLES) else kind

    def sites(
        self, calls: Iterable[AttentionCall], aspect: float, named: Collection[str] = ()
    ) -> tuple[list[tuple[Site, Layout]], list[tuple[str, str]]]:
        recorded = list(calls)
        sites, skipped = super().sites(recorded, aspect, named)
        return sites, skipped + [(name, PREDICTOR) for name in _predictor_attention(recorded)]

    def _site(self, call: AttentionCall, layout: Layout, aspect: float) -> Site:
        site, stem = super()._site(call, layout, aspect), stems.stem_of(call)
        if stem is None or not stems.per_frame(call, stem, site.windows):
            return site
        prefix = stems.prefix_rows(stem)
        grid = self.grid(call, site.tokens - prefix, aspect)
        return replace(site, prefix_tokens=prefix, grid=grid, key_grid=grid)

    def pooling(self, model: nn.Module) -> Pooling:
        model = sole_part(model, self)
        heads = [getattr(model, name, None) for name in ("classifier", "cls_classifier")]
        if not hasattr(model, "config") or all(head is None for head in heads):
            return "other"
        return _classifier_pooling(model, self.stem(model))


IMPLEMENTATION = "_attn_implementation_internal"
"""Attribute behind a configuration's property ``_attn_implementation``. The setter of the property
would also overwrite the setting for the parts of a composite model."""


def _configs(model: nn.Module) -> list[Any]:
    """Distinct configurations whose attention can be switched, outermost first."""
    configs = (getattr(module, "config", None) for module in model.modules())
    # by id and not in a set, as configurations compare by value and have no hash
    switchable = {id(c): c for c in configs if IMPLEMENTATION in getattr(c, "__dict__", {})}
    return list(switchable.values())


def _undirected(model: nn.Module, configs: list[Any]) -> list[nn.Module]:
    """Modules of image encoders with one of these configurations that do not set ``is_causal``.

    Text encoders are left out: "sdpa" treats them as causal, and they may rely on it.
    """
    images = {id(config) for config in configs if getattr(config, "patch_size", None) is not None}
    encoders = (m for m in model.modules() if id(getattr(m, "config", None)) in images)
    return [m for m in encoders if not hasattr(m, "is_causal")]


def _predicts(model: nn.Module) -> bool:
    """Whether the model runs a predictor after the encoder that can be skipped (V-JEPA 2)."""
    return "skip_predictor" in signature(model.forward).parameters


PREDICTOR = "part of a predictor that reads the values of its masks, which a dry run does not have"


def _predictor_attention(calls: list[AttentionCall]) -> list[str]:
    """Attention modules of a predictor that the dry run skips."""
    root = calls[0].parents[0] if calls and calls[0].parents else None
    if root is None or not _predicts(root):
        return []
    kinds, called = {type(call.module) for call in calls}, {call.name for call in calls}
    return [name for name, m in root.named_modules() if type(m) in kinds and name not in called]


def _unfused(implementation: str | None) -> bool:
    """Whether an implementation does not call SDPA; unknown ones belong to the user."""
    return implementation in (None, "eager", "flex_attention") or "flash" in str(implementation)


def _classifier_pooling(model: nn.Module, stem: nn.Module) -> Pooling:
    """The pooling of a Hugging Face ``...ForImageClassification``, derived from its parts."""
    body: Any = next((part for part in model.children() if stem in list(part.modules())), model)
    pooler = getattr(body, "pooler", None)
    head: Any = getattr(model, "classifier", None)
    width = getattr(body.config, "hidden_size", None) if hasattr(body, "config") else None
    if stems.takes_patches(stem):
        return "other"  # an average weighted by padding
    if hasattr(body, "post_layernorm"):  # CLIP and SigLIP average the patch tokens
        return "avg" if hasattr(model.config, "vision_config") else "other"
    if not hasattr(stem, "cls_token") or (head is not None and not _fits(head, width)):
        return "other"
    if pooler is None:
        return "prefix"
    if not hasattr(pooler, "layernorm"):
        return "other"
    return "prefix" if pooler.layernorm is None else "avg"  # BEiT


def _fits(head: nn.Module, width: int | None) -> bool:
    """Whether a head reads one token; DINOv2's reads two, the class token and the average."""
    return isinstance(head, nn.Linear) and head.in_features == width


class _AttributeFamily(_StemFamily):
    """A model that is recognised by its attributes, also as part of a larger model."""

    attributes: tuple[str, ...] = ()

    def inner(self, model: nn.Module) -> Any:
        """The first module with all of the attributes; None if there is none."""
        parts = (
            part
            for part in model.modules()
            if all(getattr(part, name, None) is not None for name in self.attributes)
        )
        return next(parts, None)

    def stem(self, model: nn.Module) -> nn.Module:
        inner = self.inner(model)
        return model if inner is None else inner

    def why_not(self, model: nn.Module) -> list[str]:
        reason = f"no module has all of {', '.join(self.attributes)}"
        return [reason] if self.inner(model) is None else []

    def input_shape(self, model: nn.Module) -> tuple[int, ...] | None:
        inner = self.inner(model)
        sides = _sides(getattr(inner, "image_size", getattr(inner, "input_resolution", None)))
        return None if sides is None else (1, self.channels(model), *sides)


class TorchvisionViT(_AttributeFamily):
    """torchvision's VisionTransformer."""

    name = "torchvision_vit"
    attributes = ("conv_proj", "class_token", "encoder", "image_size", "patch_size", "heads")

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        side = int(self.inner(model).patch_size)  # total stride of a convolutional stem
        return side, side

    def pooling(self, model: nn.Module) -> Pooling:
        return "prefix" if sole_part(model, self) is self.inner(model) else "other"


class ClipViT(_AttributeFamily):
    """The image tower of OpenAI's CLIP and of open_clip."""

    name = "clip_vit"
    attributes = ("conv1", "class_embedding", "positional_embedding", "transformer", "ln_post")

    def pooling(self, model: nn.Module) -> Pooling:
        inner = self.inner(model)
        if sole_part(model, self) is not inner or getattr(inner, "attn_pool", None) is not None:
            return "other"
        if getattr(inner, "output_tokens", False):
            return "other"
        kinds: dict[str, Pooling] = {"tok": "prefix", "avg": "avg"}
        return kinds.get(getattr(inner, "pool_type", "tok"), "other")
