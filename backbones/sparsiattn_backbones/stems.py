"""Stems: the modules that make the tokens of a vision model, and the order of those tokens.

No model library is imported. Modules are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from sparsiattn import AttentionCall, count_class_tokens

M = TypeVar("M", bound=nn.Module)

EMBEDDINGS = ("patch_embeddings", "patch_embedding", "patch_embed")
PATCH_LAYERS = (*EMBEDDINGS, "conv_proj", "conv1")
"""Names of the layer that turns an image into tokens."""
REGISTERS = ("register_tokens", "reg_token")
FRAMES = ("num_frames", "frames_per_clip")
"""Names of a configuration's number of video frames."""

ROW_SIZES = ("spatial_shapes", "pixel_position_ids")
"""Names of arguments with the sizes of images in padded rows (SigLIP 2, Gemma 4)."""

UNORDERED = (
    *("num_group_token", "message_attn", "positional_embedding_vlm"),
    *("reroll", "encoder_attn", "self_attends"),
)
"""Attributes of models whose tokens are not in raster order: groups (GroupViT), messages (X-CLIP)
or a class token (Llama 4) after the patches, mask units (Hiera), and queries that are not patches
(DETR's decoder, Perceiver's latents)."""


def _is_stem(module: nn.Module) -> bool:
    """Whether a module makes patch tokens or adds class tokens."""
    embeds = any(isinstance(getattr(module, name, None), nn.Module) for name in EMBEDDINGS)
    return embeds or count_class_tokens(module) > 0


def stems(model: nn.Module) -> Iterator[nn.Module]:
    """The stems of a model's towers; stages that add a class token do not count."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    stages = {id(stage) for stage_list in lists for stage in stage_list}
    return (m for m in model.modules() if _is_stem(m) and id(m) not in stages)


def stem_of(call: AttentionCall) -> nn.Module | None:
    """The stem of the tower or stage that a call is in.

    It is the closest parent of the call that is a stem, or a child of such a parent.
    """
    for parent in reversed(call.parents):
        # elements of a list are stages, which do not contain the stem of another stage
        children = [] if isinstance(parent, nn.ModuleList) else parent.children()
        for module in (parent, *children):
            if _is_stem(module):
                return _of_stage(module, call)
            if hasattr(module, "token_embedding"):  # a text tower
                return module
    return None


def _of_stage(stem: nn.Module, call: AttentionCall) -> nn.Module:
    """The layer that makes the tokens of the call's stage, if the stem has one per stage (PVT)."""
    layers: Any = getattr(stem, "patch_embeddings", None)
    if not isinstance(layers, nn.ModuleList):
        return stem
    above = {id(parent) for parent in call.parents}
    pairs = (
        pair
        for stages in stem.children()
        if isinstance(stages, nn.ModuleList) and len(stages) == len(layers)
        for pair in zip(layers, stages, strict=True)
    )
    return next((layer for layer, stage in pairs if id(stage) in above), stem)


def patch_layer(stem: nn.Module) -> nn.Module:
    """The layer of a stem that turns the image into tokens; the stem itself if it has none."""
    layers = (getattr(stem, name, None) for name in PATCH_LAYERS)
    return next((layer for layer in layers if isinstance(layer, nn.Module)), stem)


def first_of(module: nn.Module, kind: type[M]) -> M | None:
    """The first submodule of a class; None if there is none."""
    return next((part for part in module.modules() if isinstance(part, kind)), None)


def convolution(stem: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The convolution that turns an image, or several frames of a video, into tokens."""
    layer = patch_layer(stem)
    return first_of(layer, nn.Conv3d) or first_of(layer, nn.Conv2d)


def class_rows(stem: nn.Module) -> int:
    """Number of class tokens at the start of the sequence; Pixio has several in one parameter."""
    if hasattr(stem, "positional_embedding_vlm"):
        return 0  # Llama 4 appends its class token
    count = getattr(stem, "n_cls_tokens", None)
    return count if isinstance(count, int) else count_class_tokens(stem)


def prefix_rows(stem: nn.Module) -> int:
    """Number of class tokens and registers at the start of the sequence."""
    registers = (getattr(stem, name, None) for name in REGISTERS)
    rows = sum(tokens.shape[-2] for tokens in registers if isinstance(tokens, torch.Tensor))
    return class_rows(stem) + rows


def takes_patches(stem: nn.Module) -> bool:
    """Whether the input is flattened, padded patches (SigLIP 2 with native aspect ratios)."""
    return isinstance(getattr(stem, "patch_embedding", None), nn.Linear)


def packs(stem: nn.Module) -> bool:
    """Whether the patches of all images are in one sequence with rotary positions (Pixtral)."""
    return hasattr(stem, "patch_conv") and hasattr(stem, "patch_positional_embedding")


def module_taking(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module, str] | None:
    """The outermost module with one of these arguments, and the argument; None if there is none."""
    for path, module in model.named_modules():
        for name in names:
            if name in _parameters(module):
                return path, module, name
    return None


def _parameters(module: nn.Module) -> Collection[str]:
    """Names of the parameters of a module's forward."""
    try:
        return signature(module.forward).parameters
    except (TypeError, ValueError):  # a compiled function may not tell
        return ()


def packed_window(tower: Any, merge: int) -> int | None:
    """Side, in patches, of the windows of most layers (Qwen2.5-VL); None if there are none."""
    layers, window = getattr(tower, "fullatt_block_indexes", None), getattr(tower, "window_size", 0)
    if layers is None or not window:
        return None
    return merge * (int(window) // merge // int(tower.patch_size))


def takes_packed(config: Any) -> bool:
    """Whether the patches of all images are in one sequence (Qwen-VL, GLM-V and similar models).

    They are sorted by the groups that are merged at the end.
    """
    return getattr(config, "spatial_merge_size", None) is not None


def in_raster_order(call: AttentionCall, stem: nn.Module | None) -> bool:
    """Whether the tokens after the prefix are exactly the image's patches in raster order."""
    if any(call.nearest(name) is not None for name in UNORDERED):
        return False
    if takes_packed(call.nearest("config")):
        return False
    if any(name in _parameters(parent) for parent in call.parents for name in ROW_SIZES):
        return False  # images have sizes of their own, which were not confirmed
    if stem is None:
        return True
    if getattr(stem, "attention_type", "") == "joint_space_time":
        return False  # frames are the inner dimension in TimeSformer then
    # YOLOS appends tokens, masked autoencoders shuffle them
    changed = hasattr(stem, "detection_tokens") or hasattr(stem, "random_masking")
    return not (changed or takes_patches(stem))


def frames(stem: nn.Module, config: Any) -> int | None:
    """Number of video frames in the stem's input; None if it takes images."""
    counts = (getattr(config, name, None) for name in FRAMES)
    count = next((n for n in counts if isinstance(n, int)), None)
    # in TimeSformer the convolution takes single frames
    takes_video = _cubes(stem) is not None or hasattr(stem, "attention_type")
    return count if takes_video else None


def _cubes(stem: nn.Module) -> nn.Conv3d | None:
    """The convolution that turns several frames of a video into tokens; None if there is none."""
    return first_of(patch_layer(stem), nn.Conv3d)


def steps(stem: nn.Module, config: Any) -> int:
    """Number of time steps in one sequence; 1 for an image or a single frame."""
    count, layer = frames(stem, config), _cubes(stem)
    return 1 if count is None or layer is None else count // layer.stride[0]


def along_time(call: AttentionCall) -> bool:
    """Whether a sequence is one position in all frames (TimeSformer)."""
    modules = (call.module, *call.parents)
    temporal = [getattr(parent, "temporal_attention", None) for parent in call.parents]
    return any(module is attention for attention in temporal for module in modules)


def per_frame(call: AttentionCall, stem: nn.Module, sequences: int) -> bool:
    """Whether every sequence is one frame with its own class tokens (TimeSformer)."""
    spatial = call.nearest("temporal_attention") is not None and not along_time(call)
    return spatial and sequences > 1 and sequences == frames(stem, call.nearest("config"))
