"""What a line does to a model: options of ``patch``, and what people do without this library.

A line is the options of ``patch`` with any of ``resolution`` (a share of the image's side),
``layers`` (blocks that are kept, the first ones), ``dtype="bfloat16"`` and ``quantize="int8"``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsiattn

Line = dict[str, Any]
# what is not for `patch`
OWN = ("resolution", "layers", "dtype", "quantize")


def typed(line: Line) -> str:
    """The options as a user types them."""
    return ", ".join(f"{name}={value!r}" for name, value in line.items()).replace("'", '"')


@dataclass(frozen=True)
class Variant:
    """A model as a line has it.

    Attributes:
        model: A timm ViT, a copy.
        size: Pixels a side that it takes.
        dtype: Of its images.
        patch: None where the line says nothing of `patch`.
    """

    model: Any
    size: int
    dtype: torch.dtype = torch.float32
    patch: sparsiattn.Patch | None = field(default=None, compare=False)

    def images(self, images: Tensor) -> Tensor:
        """Images as this model takes them."""
        if images.shape[-1] != self.size:
            sides = (self.size, self.size)
            images = F.interpolate(images, sides, mode="bicubic", antialias=True)
        return images.to(self.dtype)

    def tokens(self, images: Tensor, grid: int) -> Tensor:
        """Final tokens ``[B, prefix + grid * grid, C]``; those of another grid are resampled."""
        tokens: Tensor = self.model.forward_features(self.images(images)).float()
        prefix, side = self.model.num_prefix_tokens, self.model.patch_embed.grid_size[0]
        if side == grid:
            return tokens
        maps = tokens[:, prefix:].mT.unflatten(-1, (side, side))
        maps = F.interpolate(maps, (grid, grid), mode="bilinear", align_corners=False)
        return torch.cat([tokens[:, :prefix], maps.flatten(2).mT], 1)


@contextmanager
def variant(model: Any, line: Line) -> Iterator[Variant]:
    """A copy of the model as the line has it, inside the block."""
    options = {name: value for name, value in line.items() if name not in OWN}
    made, size = _copy(model, line), model.patch_embed.img_size[0]
    if "resolution" in line:
        size = _size(model, line["resolution"])
        made.set_input_size(img_size=size)
    if "layers" in line:
        made.blocks = made.blocks[: line["layers"]]
    dtype = getattr(torch, line.get("dtype", "float32"))
    made.to(dtype)
    if "quantize" in line:
        _quantize(made)
    with sparsiattn.patch(made, **options) if options else nullcontext() as patch:
        yield Variant(made, size, dtype, patch)


def _copy(model: Any, line: Line) -> Any:
    if line.keys() & {"resolution", "dtype", "quantize"}:  # which change weights
        return copy.deepcopy(model)
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _size(model: Any, share: float) -> int:
    """The nearest size that whole patches cover."""
    patch, size = model.patch_embed.patch_size[0], model.patch_embed.img_size[0]
    return int(patch * round(share * size / patch))


def _quantize(model: Any) -> None:
    """Weights and, by token, inputs of linear layers, as torchao has it."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
