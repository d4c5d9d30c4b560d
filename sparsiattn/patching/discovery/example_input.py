"""Turns the ``input=`` of `patch` into the inputs of a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparsiattn.attention.example import Example
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.discovery.backbone import Backbone
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.runtime.hook_tools import tensors_in

SQUARE = (1, 3, 1, 1)
"""Shape of a placeholder image, for models whose image size is neither known nor needed."""


def read_examples(model: nn.Module, backbone: Backbone, input: Any) -> list[Example]:
    """All meanings of ``input=``, most likely first; three sizes can be an image or tokens.

    Args:
        model: The model.
        backbone: Its adapter.
        input: An `Example`, a shape, an image, tokens ``[B, N, C]``, a mapping of keyword arguments
            or a tuple of positional ones; None for the image size that the model states.

    Raises:
        InvalidOption: ``input`` is none of these, or None and the model states no size.
    """
    if input is None:
        return [Example(_own_shape(model, backbone))]
    if isinstance(input, Example):
        return [input]
    if isinstance(input, Mapping) or _is_call(input):
        return [_call_example(input)]
    sizes = input.shape if isinstance(input, Tensor) else input
    shape = tuple(sizes) if isinstance(sizes, (tuple, list)) else ()
    if len(shape) < 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidOption(
            "input must be (1, channels, height, width) or an example tensor, tokens [B, N, C] for "
            "a part of a model, a dict of keyword arguments or a tuple of positional ones, got "
            f"{input!r}"
        )
    image = _image_example(input, shape)
    if len(shape) != 3:
        return [image]
    tokens = _token_example(model, input, shape)
    takes_images = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    return [image, tokens] if takes_images else [tokens, image]


def _is_call(input: Any) -> bool:
    return isinstance(input, (tuple, list)) and bool(tensors_in(list(input)))


def _own_shape(model: nn.Module, backbone: Backbone) -> tuple[int, ...]:
    shape = backbone.input_shape(model)
    if shape is None:
        raise InvalidOption(
            f"{type(model).__name__} does not state its input size (no pretrained_cfg, no "
            "config): pass input=(1, channels, height, width) or an example tensor; for a part of "
            "a model, the tokens [B, N, C] that it takes"
        )
    return shape


def _image_example(input: Any, shape: tuple[int, ...]) -> Example:
    if isinstance(input, Tensor):
        input = (input[None] if len(shape) == 3 else input)[:1].detach()
    return Example(
        (1, *(shape[1:] if len(shape) > 3 else shape)),
        image=input if isinstance(input, Tensor) else None,
    )


def _token_example(model: nn.Module, input: Any, shape: tuple[int, ...]) -> Example:
    """One sequence of tokens; torch's own layers may have the batch as second dimension."""
    axis = 0 if _is_batch_first(model) else 1
    if isinstance(input, Tensor):
        tokens = input.narrow(axis, 0, 1).detach()
    else:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        shape = tuple(1 if i == axis else size for i, size in enumerate(shape))
        tokens = torch.empty(shape, dtype=dtype, device="meta")
    return Example(tuple(tokens.shape), ((tokens,), {}))


_OF_TORCH = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def _is_batch_first(model: nn.Module) -> bool:
    """Whether a part takes ``[B, N, C]``; only torch's own layers may not."""
    while isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    if not isinstance(model, _OF_TORCH):
        return True
    attention = (m.batch_first for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return next(attention, True)


def _call_example(input: Any) -> Example:
    arguments: MetaInputs = ((), dict(input)) if isinstance(input, Mapping) else (tuple(input), {})
    if not tensors_in(arguments):
        raise InvalidOption(f"input must hold at least one tensor, got {input!r}")
    arguments = _one_item(arguments)
    tensors = tensors_in(arguments)
    images = [x for x in tensors if x.dim() >= 4 and x.is_floating_point()]
    return Example(tuple((images + tensors)[0].shape), arguments)


def _one_item(arguments: MetaInputs) -> MetaInputs:
    """The arguments for the first image, if all tensors have the same batch dimension.

    Packed images ``[patches, values]`` have no batch dimension and are not changed.
    """
    tensors = tensors_in(arguments)
    sizes = {len(x) if x.dim() else 0 for x in tensors}
    batched = len(sizes) == 1 and any(x.dim() > 2 for x in tensors)
    return tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda x: x.detach()[:1] if batched else x.detach(), arguments
    )


def inputs_of(example: Example, model: nn.Module, backbone: Backbone) -> MetaInputs:
    """The inputs of a copy of the model: meta tensors, or tensors with values.

    Args:
        example: The example that was read from ``input=``.
        model: The model, which determines device and dtype of an image.
        backbone: Its adapter.
    """
    arguments = example.arguments or backbone.meta_inputs(model, example.shape)
    if not example.with_values:
        if example.arguments is None:
            return arguments  # an adapter knows which of its tensors must have data
        return tree_map_only(  # type: ignore[no-any-return]
            Tensor, lambda x: torch.empty_like(x, device="meta"), arguments
        )
    like = next((p for p in model.parameters() if p.is_floating_point() and not p.is_meta), None)
    device = torch.device("cpu") if like is None else like.device
    return tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda x: _with_values(x, example.image, device), arguments
    )


def _with_values(tensor: Tensor, image: Tensor | None, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return tensor.clone().to(device if tensor.dim() else tensor.device)
    if image is not None and image.shape == tensor.shape and not image.is_meta:
        return image.to(device, tensor.dtype, copy=True)
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tensor.shape, generator=generator).to(device, tensor.dtype)


def without_data(example: Example) -> Example:
    """The example as a patch keeps it: floating-point tensors (pixels) become meta tensors."""

    def emptied(x: Tensor) -> Tensor:
        return torch.empty_like(x, device="meta") if x.is_floating_point() else x

    if example.with_values:
        return example
    return replace(example, arguments=tree_map_only(Tensor, emptied, example.arguments), image=None)
