"""Sites whose images have sizes of their own: every image is planned on its own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsiattn.attention.inputs import MASKED_BELOW
from sparsiattn.attention.layout import HostCall
from sparsiattn.attention.packing import PackedPart, Packing
from sparsiattn.attention.padding import OwnTokens, without_trivial_mask
from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.padded_attention import attend_own, find_own_tokens
from sparsiattn.runtime.reduced_attention import full_attention
from sparsiattn.runtime.site_runtime import Decision, SiteRuntime
from sparsiattn.runtime.thread_state import SITE_CALLS
from sparsiattn.strategies.base import Planner


def packed_attention(runtime: SiteRuntime, planner: Planner, call: HostCall) -> Tensor:
    """The result of a host's call for one image, for all in one sequence, or for a batch of rows.

    Raises:
        InvalidOption: No image of the model's input has that many tokens at this place.
    """
    packing, count = runtime.owner.packing_here(), call.q.shape[-2]
    if packing is None:
        return full_attention(runtime, planner, call)
    if packing.by_row:
        return _rows(runtime, planner, call, packing)
    start = SITE_CALLS.offset
    part = packing.find(start, count)
    if part is not None:
        SITE_CALLS.offset = start + count
        return full_attention(runtime, planner, call, part, ("part", start, count))
    if runtime.decide(count) is Decision.HOST:
        SITE_CALLS.offset = start + count
        return runtime.host(call)
    if start == 0 and count == packing.tokens:
        return _all_images(runtime, planner, call, packing)
    raise InvalidOption(
        f"site {runtime.site.name!r} got a sequence of {count} tokens that begins at token "
        f"{start}, but no frame, clip or window of this call's images ({packing}; "
        f"{packing.tokens} patches) is like that: bounds such as cu_seqlens must be those of the "
        "images"
    )


def _all_images(runtime: SiteRuntime, planner: Planner, call: HostCall, packing: Packing) -> Tensor:
    """One call for all images: image by image, if its mask keeps them apart."""
    for parts in (packing.frames(), packing.clips()):
        lengths = [part.tokens for part in parts]
        if call.mask is not None and keeps_apart(call.mask, lengths):
            calls = zip(_cut(call, lengths), parts, strict=True)
            rows = [
                full_attention(runtime, planner, one, part, ("part", i, part.tokens))
                for i, (one, part) in enumerate(calls)
            ]
            return torch.cat(rows, dim=-2)
    return full_attention(runtime, planner, call)


def _rows(runtime: SiteRuntime, planner: Planner, call: HostCall, packing: Packing) -> Tensor:
    """Attention of padded rows, each image on its own grid; without it if sizes do not fit."""
    if runtime.decide(call.k.shape[-2]) is Decision.HOST:
        return runtime.host(call)
    call, own = find_own_tokens(runtime, call)
    parts, batch = packing.clips(), runtime.layout.fold(call.q).shape[0]
    if own is None and parts == parts[:1] * batch and parts[0].tokens == call.q.shape[-2]:
        return runtime.attention(planner, call, part=parts[0])
    if own is None:
        every = torch.arange(call.q.shape[-2], device=call.q.device)
        own = OwnTokens((every,) * batch, len(every))
    if len(parts) == batch and all(map(_fills, parts, own.places)):
        own = replace(own, parts=parts)
    return attend_own(runtime, planner, call, own)


def _fills(part: PackedPart, places: Tensor) -> bool:
    """Whether an image of this size has these tokens of its row: the first ones."""
    return len(places) == part.tokens and int(places[-1]) == part.tokens - 1


def keeps_apart(mask: Tensor, lengths: Sequence[int]) -> bool:
    """Whether a mask over all tokens allows pairs within parts of these lengths only.

    >>> keeps_apart(torch.eye(4).bool(), [2, 2]), keeps_apart(torch.ones(4, 4).bool(), [2, 2])
    (True, False)
    """
    if mask.is_meta or mask.shape[-2:] != (sum(lengths), sum(lengths)):
        return False
    allowed = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
    within = [int(block.sum()) for block in _diagonal(allowed, lengths)]
    return int(allowed.sum()) == sum(within)


def _diagonal(mask: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The blocks of a mask on its diagonal."""
    rows = mask.split(list(lengths), dim=-2)
    return [row.split(list(lengths), dim=-1)[i] for i, row in enumerate(rows)]


def _cut(call: HostCall, lengths: Sequence[int]) -> list[HostCall]:
    """The call of every part of the sequence."""
    assert call.mask is not None
    operands = [x.split(list(lengths), dim=-2) for x in (call.q, call.k, call.v)]
    return [
        without_trivial_mask(replace(call, q=q, k=k, v=v, mask=mask))
        for q, k, v, mask in zip(*operands, _diagonal(call.mask, lengths), strict=True)
    ]
