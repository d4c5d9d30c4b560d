"""Finds models that take several images as one sequence, and the images of every call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sparsiattn.attention.packing import PackedInput, Packing
from sparsiattn.patching.discovery.probe import AttentionCall, Probe
from sparsiattn.runtime.image import read_packing


def with_packed_images(
    packed: PackedInput | None, model: nn.Module, run: Probe
) -> tuple[PackedInput | None, list[AttentionCall]]:
    """How a model packs images, and its attention calls with the images that they attend to.

    Args:
        packed: What the adapter says; None if it says that the model packs no images.
        model: The copy that ran.
        run: The record of the run.

    Returns:
        None in place of ``packed`` if the positions that the model computes do not confirm it, or
        if no call attends to the images.

    Raises:
        InvalidOption: The sizes of the images do not add up to the number of patches.
    """
    confirmed = _confirmed(packed, model, run)
    if confirmed is None:
        return None, run.calls
    calls = [_with_parts(call, confirmed[1]) for call in run.calls]
    return (confirmed[0] if any(call.parts for call in calls) else None), calls


def _confirmed(
    packed: PackedInput | None, model: nn.Module, run: Probe
) -> tuple[PackedInput, Packing] | None:
    """How a model packs the images of a dry run, if its own positions confirm it."""
    if packed is None or run.arguments is None:
        return None
    packing = read_packing(packed, model.get_submodule(packed.module), *run.arguments)
    tables = [] if packing is None else [x for x in run.positions if len(x) == packing.tokens]
    for merge in dict.fromkeys((packed.merge, 1)):
        tried = replace(packed, merge=merge)
        if packing is not None and any(map(tried.packing(packing.images).fits, tables)):
            return tried, tried.packing(packing.images)
    return None


def _with_parts(call: AttentionCall, packing: Packing) -> AttentionCall:
    """The call with the images that it attends to, and with the shapes of the largest of them.

    It is unchanged if it does not attend to the images of this packing.
    """
    parts = packing.follow(call.lengths)
    if parts is None and call.lengths == (packing.tokens,) and call.mask is not None:
        parts = packing.frames() if packing.frames() == packing.clips() else None
    if parts is None or len(call.q) != 4 or len({len(shape) for shape in (call.q, call.k)}) > 1:
        return call
    longest = max(part.tokens for part in parts)
    shapes = {
        name: torch.Size([*getattr(call, name)[:-2], longest, getattr(call, name)[-1]])
        for name in ("q", "k", "v")
    }
    lengths = tuple(part.tokens for part in parts)
    return replace(call, **shapes, parts=parts, lengths=lengths, q_places=None, k_places=None)
