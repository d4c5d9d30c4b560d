"""Smaller images instead of a patch: what the dense model gives at the same speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.analysis.recommendation.contenders import Contender, Runner, short, weights_shared
from sparsiattn.analysis.recommendation.families import Shape
from sparsiattn.attention.geometry import Grid
from sparsiattn.errors import SparsiattnError
from sparsiattn.patching.model_outputs import main_tensor

LABEL = "dense, smaller images"


def smaller(runner: Runner, shape: Shape, ratio: float) -> Contender:
    """The dense model on images so small that it should be so many times as fast.

    Features are resized back to the dense model's grid. It has a reason where the model takes no
    other size, or no such size is left.
    """
    height, width = runner.batches[0].shape[-2:]
    site = max((site for site, _ in runner.surveyed.sites), key=lambda site: site.tokens)
    unit = runner.surveyed.backbone.patch_size(runner.dense)
    if unit == (1, 1):  # nothing says it
        unit = (max(1, height // site.grid[0]), max(1, width // site.grid[1]))
    sizes = tuple(
        _multiple(side * math.sqrt(_tokens_share(shape.attention, ratio)), step)
        for side, step in zip((height, width), unit, strict=True)
    )
    label = f"dense at {sizes[0]} x {sizes[1]} pixels"
    if sizes == (height, width):
        return Contender({}, label=LABEL, reason="images are as small as they can be")
    small = [_resized(batch, sizes) for batch in runner.batches]
    try:
        run = _model_for(runner, small, sizes)
    except Exception as error:  # whatever a host raises at a size that it was not built for
        return Contender({}, label=LABEL, reason=f"takes no other size: {short(error)}")

    def compare(dense: Any, output: Any) -> Tensor | float:
        if runner.metric.kind == "callable":
            return runner.metric.compare(runner.dense, dense, output)
        like = main_tensor(dense)
        resized = _resized_like(main_tensor(output), like, site.grid, sizes)
        return runner.metric.compare(runner.dense, like, resized)

    return Contender({}, run, compare, label=label)


def _tokens_share(attention: float, ratio: float) -> float:
    """Share of the tokens with which the model takes 1 / ratio of the time, by its MACs."""
    linear = 1.0 - attention
    root = math.sqrt(linear**2 + 4.0 * attention / ratio)
    return (root - linear) / (2.0 * attention) if attention > 1e-6 else 1.0 / ratio


def _multiple(side: float, step: int) -> int:
    return max(step, int(side / step) * step)


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    flat = images.float().flatten(0, -4)  # of several views, one after the other
    resized = F.interpolate(flat, size, mode="bicubic", antialias=True)
    views: Tensor = resized.unflatten(0, images.shape[:-3])
    return views.to(images.dtype)


def _model_for(runner: Runner, small: list[Tensor], size: tuple[int, ...]) -> Callable[[int], Any]:
    """From a number of a batch to the output for it at the smaller size."""
    model: Any = runner.dense
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in signature(model.forward).parameters:
        options = {"interpolate_pos_encoding": True}
    elif not getattr(model, "dynamic_img_size", False) and hasattr(model, "set_input_size"):
        model = weights_shared(model)
        model.set_input_size(img_size=size)

    def run(batch: int) -> Any:
        return runner.metric.outputs(model, (small[batch],), options)

    with torch.no_grad():
        run(0)
    return run


def _resized_like(features: Tensor, like: Tensor, grid: Grid, pixels: tuple[int, ...]) -> Tensor:
    """Features of smaller images in the shape of those of the dense model.

    Args:
        features: ``[B, D]``, ``[B, N, D]``, ``[B, D, H, W]`` or ``[B, H, W, D]``.
        like: The dense model's.
        grid: Rows and columns of its patches.
        pixels: Height and width of the smaller images.

    Raises:
        SparsiattnError: They are of no such kind.
    """
    if features.shape == like.shape:
        return features
    if features.dim() == 4 and features.shape[1] == like.shape[1]:
        return _bilinear(features, (like.shape[2], like.shape[3]))
    if features.dim() == 4 and features.shape[3] == like.shape[3]:
        return _bilinear(features.movedim(3, 1), (like.shape[1], like.shape[2])).movedim(1, 3)
    prefix = like.shape[1] - grid[0] * grid[1]
    count = features.shape[1] - prefix
    rows = round(math.sqrt(max(0, count) * pixels[0] / pixels[1]))
    if prefix < 0 or rows < 1 or count % rows or features.dim() != 3:
        raise SparsiattnError("features of smaller images cannot be resized to the dense grid")
    maps = features[:, prefix:].unflatten(1, (rows, count // rows)).movedim(3, 1)
    return torch.cat([features[:, :prefix], _bilinear(maps, grid).flatten(2).mT], dim=1)


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear")
