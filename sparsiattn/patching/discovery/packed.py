"""Finds models that take several images as one sequence, and the images of every call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sparsiattn.attention.packing import PackedInput, PackedPart, Packing
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.patching.discovery.probe import AttentionCall, Probe
from sparsiattn.runtime.image import read_packing


def packing_of(packed: PackedInput, model: nn.Module, arguments: MetaInputs) -> Packing | None:
    """The sizes of images in padded rows among a model's own arguments.

    A dry run does not need their values, so that its own arguments may have none.

    Args:
        packed: What the adapter says.
        model: The copy that ran.
        arguments: Its arguments, with values.
    """
    if packed.module or not packed.by_row:
        return None
    return read_packing(packed, model, *arguments)


def with_packed_images(
    packed: PackedInput | None, run: Probe
) -> tuple[PackedInput | None, list[AttentionCall]]:
    """How a model packs images, and its attention calls with the images that they attend to.

    Args:
        packed: What the adapter says; None if it says that the model packs no images.
        run: The record of a dry run.

    Returns:
        None in place of ``packed`` if the positions that the model computes do not confirm it, or
        if no call attends to the images.
    """
    packed = _confirmed(packed, run)
    if packed is None or run.packing is None:
        return None, run.calls
    packing = packed.packing(run.packing.images)
    calls = [_with_parts(call, packing) for call in run.calls]
    return (packed if any(call.parts for call in calls) else None), calls


def _confirmed(packed: PackedInput | None, run: Probe) -> PackedInput | None:
    """How a model packs images, with the order of patches that its own positions confirm."""
    if packed is None or run.packing is None:
        return None
    if packed.by_row:
        return packed
    images, stated = run.packing.images, run.positions
    if any(map(packed.packing(images).fits, (*stated.arguments, *stated.indices))):
        return packed
    # positions in raster order that a table is indexed with may precede a sort into squares
    raster = replace(packed, merge=1)
    return raster if any(map(raster.packing(images).fits, stated.arguments)) else None


def _with_parts(call: AttentionCall, packing: Packing) -> AttentionCall:
    """The call with the images that it attends to, and with the shapes of the largest of them.

    It is unchanged if it does not attend to the images of this packing.
    """
    if packing.by_row:
        return _of_row(call, packing)
    parts = packing.follow(call.lengths)
    if parts is None and call.lengths == (packing.tokens,) and call.mask is not None:
        parts = packing.frames() if packing.frames() == packing.clips() else None
    if parts is None or len(call.q) != 4 or len({len(shape) for shape in (call.q, call.k)}) > 1:
        return call
    longest = max(part.tokens for part in parts)
    q, k, v = (torch.Size([*x[:-2], longest, x[-1]]) for x in (call.q, call.k, call.v))
    lengths = tuple(part.tokens for part in parts)
    return replace(call, q=q, k=k, v=v, parts=parts, lengths=lengths)


def _of_row(call: AttentionCall, packing: Packing) -> AttentionCall:
    """The call with the grid of its image, if it attends to one row of patches."""
    tokens, part = call.q[-2], packing.clips()[0]
    if len(packing.images) > 1 or call.count > 1 or call.lengths != (tokens,) or tokens == 1:
        return call
    # with padding, the example has no grid for all of its tokens
    return replace(call, parts=(part if part.tokens == tokens else PackedPart((1, tokens)),))
