"""Where the tokens of a vision model are made, and in which order they stand then.

None of the libraries is imported; modules are known by the attributes they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparsiattn import AttentionCall
from sparsiattn.patching.discovery.backbone import count_class_tokens

EMBEDDINGS = ("patch_embeddings", "patch_embedding", "patch_embed")
PATCHERS = (*EMBEDDINGS, "conv_proj", "conv1")
"""Names of the layer that makes tokens of an image."""
REGISTERS = ("register_tokens", "reg_token")
FRAMES = ("num_frames", "frames_per_clip")
"""Names of a configuration's frames in a video."""

UNORDERED = (
    *("num_group_token", "message_attn", "positional_embedding_vlm"),
    *("reroll", "encoder_attn", "self_attends"),
)
"""Marks of groups (GroupViT), messages (X-CLIP) and a class token (Llama 4) behind the patches, of
mask units (Hiera), of queries that are no patches (DETR's decoder, Perceiver's latents)."""


def _is_stem(module: nn.Module) -> bool:
    """Whether this module puts class tokens in front of patches, or at least makes the patches."""
    made = any(isinstance(getattr(module, name, None), nn.Module) for name in EMBEDDINGS)
    return made or count_class_tokens(module) > 0


def stems(model: nn.Module) -> Iterator[nn.Module]:
    """The stems of a model's towers; stages that add a class token of their own are none."""
    listed = {id(m) for parent in model.modules() for m in _elements(parent)}
    return (m for m in model.modules() if _is_stem(m) and id(m) not in listed)


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    return module.children() if isinstance(module, nn.ModuleList) else iter(())


def stem_of(call: AttentionCall) -> nn.Module | None:
    """The stem of the tower (or stage) that a call is in: of its closest parent that is one or
    holds one."""
    for parent in reversed(call.parents):
        listed = isinstance(parent, nn.ModuleList)
        candidates: list[nn.Module] = [parent, *([] if listed else parent.children())]
        for module in candidates:
            if _is_stem(module):
                return _of_stage(module, call)
            if hasattr(module, "token_embedding"):  # of text
                return module
    return None


def _of_stage(stem: nn.Module, call: AttentionCall) -> nn.Module:
    """The layer that makes the tokens of this call's stage, where a stem has one for each (PVT)."""
    layers: Any = getattr(stem, "patch_embeddings", None)
    if not isinstance(layers, nn.ModuleList):
        return stem
    above = {id(parent) for parent in call.parents}
    for stages in stem.children():
        if isinstance(stages, nn.ModuleList) and len(stages) == len(layers):
            for layer, stage in zip(layers, stages, strict=True):
                if id(stage) in above and isinstance(layer, nn.Module):
                    return layer
    return stem


def patcher(stem: nn.Module) -> nn.Module:
    """The layer of a stem that makes tokens of the image; the stem itself if it has none."""
    layers = (getattr(stem, name, None) for name in PATCHERS)
    return next((layer for layer in layers if isinstance(layer, nn.Module)), stem)


def convolution(module: nn.Module) -> nn.Conv2d | None:
    return next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)


def cubes(module: nn.Module) -> nn.Conv3d | None:
    """The convolution that makes tokens of several frames of a video."""
    return next((layer for layer in module.modules() if isinstance(layer, nn.Conv3d)), None)


def class_rows(stem: nn.Module) -> int:
    """Class tokens at the head of the sequence; Pixio has several in one parameter."""
    if hasattr(stem, "positional_embedding_vlm"):
        return 0  # Llama 4 appends its own
    several = getattr(stem, "n_cls_tokens", None)
    return several if isinstance(several, int) else count_class_tokens(stem)


def prefix_rows(stem: nn.Module) -> int:
    """Class tokens and registers at the head of the sequence."""
    found = (getattr(stem, name, None) for name in REGISTERS)
    registers = sum(tokens.shape[-2] for tokens in found if isinstance(tokens, torch.Tensor))
    return class_rows(stem) + registers


def takes_patches(stem: nn.Module) -> bool:
    """SigLIP 2 with native aspect ratios: cut, flattened and padded patches instead of an image."""
    return isinstance(getattr(stem, "patch_embedding", None), nn.Linear)


def packs(stem: nn.Module) -> bool:
    """Pixtral: patches of all images in one sequence, turned by tables of rotary positions."""
    return hasattr(stem, "patch_conv") and hasattr(stem, "patch_positional_embedding")


def in_raster_order(call: AttentionCall, stem: nn.Module | None) -> bool:
    """Whether nothing but the patches of the image, in their order, follows the prefix."""
    if any(call.nearest(name) is not None for name in UNORDERED):
        return False
    if stem is None:
        return True
    if getattr(stem, "attention_type", "") == "joint_space_time":
        return False  # TimeSformer's frames are the inner dimension then
    # YOLOS appends tokens too, masked autoencoders shuffle theirs
    changed = hasattr(stem, "detection_tokens") or hasattr(stem, "random_masking")
    return not (changed or takes_patches(stem))


def frames(stem: nn.Module, config: Any) -> int | None:
    """Frames of a video that the stem takes at once; None if it takes images."""
    found = (getattr(config, name, None) for name in FRAMES)
    count = next((n for n in found if isinstance(n, int)), None)
    timed = cubes(patcher(stem)) is not None or hasattr(stem, "attention_type")  # TimeSformer
    return count if timed else None


def steps(stem: nn.Module, config: Any) -> int:
    """Steps in time among the tokens of one sequence; 1 for an image, or a frame by itself."""
    count, layer = frames(stem, config), cubes(patcher(stem))
    return 1 if count is None or layer is None else count // layer.stride[0]


def along_time(call: AttentionCall) -> bool:
    """Whether a sequence is one place in all frames (TimeSformer)."""
    inside = (call.module, *call.parents)
    timed = (getattr(parent, "temporal_attention", None) for parent in call.parents)
    return any(module is found for found in timed if found is not None for module in inside)


def per_frame(call: AttentionCall, stem: nn.Module, sequences: int) -> bool:
    """Whether every sequence is one frame with class tokens of its own (TimeSformer)."""
    spatial = call.nearest("temporal_attention") is not None and not along_time(call)
    return spatial and sequences > 1 and sequences == frames(stem, call.nearest("config"))
