"""Attention over padded batches: every image gives the same result as alone, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.derivatives import is_exporting
from sparsiattn.attention.layout import HostCall, Maps, patch_grid
from sparsiattn.attention.packing import PackedPart
from sparsiattn.attention.padded import PaddedTokens
from sparsiattn.attention.padding import (
    BY_IMAGE,
    OwnTokens,
    attend_by_group,
    hides_keys,
    own_tokens,
    part_of,
    with_explicit_mask,
    without_trivial_mask,
)
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.runtime.site_runtime import Decision, SiteRuntime
from sparsiattn.runtime.thread_state import SITE_CALLS
from sparsiattn.strategies.base import Planner


def find_own_tokens(
    runtime: SiteRuntime, call: HostCall, *, reduces: bool = False
) -> tuple[HostCall, OwnTokens | None]:
    """The tokens of each image that are not padding, read from a call's mask.

    Args:
        runtime: The site.
        call: Its call.
        reduces: Whether the call belongs to a sequence that a token strategy reduces.

    Returns:
        The call, without a mask that hides nothing, and each image's own tokens; None if no image
        has padding.
    """
    if not _may_hide(runtime, call):
        return call, None
    if torch.compiler.is_compiling() and not is_exporting() and not reduces:
        # no branch on values here: padding stays masked, but counts in the budget of keys
        return call, None
    assert call.mask is not None
    _refuse_graphs(runtime, call.mask)
    explicit = with_explicit_mask(call, runtime.layout)
    assert explicit.mask is not None
    if hides_keys(explicit.mask):
        batch = runtime.layout.fold(call.q).shape[0]
        prefix = runtime.site.prefix_tokens
        own = own_tokens(explicit.mask, batch, call.k.shape[-2], prefix)
        if own.padded:
            return explicit, own
    return (call if runtime.site.bias == "bias" else without_trivial_mask(call)), None


def _may_hide(runtime: SiteRuntime, call: HostCall) -> bool:
    """Whether the mask may hide padding, so that its values must be read (a device sync)."""
    mask, site = call.mask, runtime.site
    if mask is None or mask.is_meta or runtime.layout.form not in BY_IMAGE:
        return False
    # window masks do not mark padding; in reduced blocks, windows are frames or tiles
    if site.windows > 1 and runtime.block is None:
        return False
    if call.q.shape[0] == 0:
        return False
    # a graph cannot branch on values; a mask shared by all images at patch time still is shared
    fixed = site.bias == "bias" or (site.bias == "mask" and mask.shape[:-3].numel() == 1)
    return not (fixed and _in_graph())


def _in_graph() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _refuse_graphs(runtime: SiteRuntime, mask: Tensor) -> None:
    if not (_in_graph() or torch._C._functorch.is_batchedtensor(mask)):
        return
    raise InvalidOption(
        f"site {runtime.site.name!r} got a mask. Only its values tell which tokens are padding, "
        "and torch.compile, tracing, export and vmap cannot read values: run padded batches "
        "eagerly, or pass images without padding and without a mask"
    )


def attend_own(
    runtime: SiteRuntime,
    planner: Planner,
    call: HostCall,
    own: OwnTokens,
    state: TokenState | None = None,
) -> Tensor:
    """Attention of a padded batch in which no token has been dropped yet."""
    if runtime.decide(call.k.shape[-2]) is Decision.HOST:
        return runtime.host(call)
    # patterns that a second call of the module must share
    shared: dict[Any, Any] = SITE_CALLS.shared if isinstance(SITE_CALLS.shared, dict) else {}

    def sparse(part: HostCall, grid: PackedPart | None) -> Tensor:
        group = part.k.shape[-2], grid
        SITE_CALLS.shared = shared.pop(group, None)
        out = runtime.attention(planner, part, state, group, grid)
        if SITE_CALLS.shared is not None:
            shared[group] = SITE_CALLS.shared
        return out

    out = attend_by_group(call, runtime.layout, own, sparse, runtime.host)
    SITE_CALLS.shared = shared or None
    return out


def begin_padded(site: Site, maps: Maps | None, state: TokenState, own: OwnTokens) -> PaddedTokens:
    """The token states of a batch whose padding has just been found.

    Args:
        site: A site of the block.
        maps: As in `patch_grid`.
        state: The state of the batch, before any reduction.
        own: Each image's own tokens.
    """
    if state.suffix:
        raise InvalidOption(
            f"site {site.name!r} has tokens after the patches ({site.structure}), whose positions "
            "in a padded batch are not known: pass images without padding"
        )
    prefix = state.prefix
    states = [
        replace(state, grid=patch_grid(site.grid, n, site, maps) or (1, n))
        for n in (len(places) - prefix for places in own.places)
    ]
    return replace(PaddedTokens.of(states, own, state.layer), sequence=state.sequence)


def image_calls(
    runtime: SiteRuntime, state: PaddedTokens, call: HostCall
) -> Iterator[tuple[TokenState, HostCall]]:
    """Yield each image's state and its part of a call, without padding.

    Raises:
        ModelChanged: The host's mask has another number of keys than the batch has tokens.
    """
    total = state.own.total
    if call.mask is not None and call.mask.shape[-1] not in (1, total):
        raise ModelChanged(
            f"site {runtime.site.name!r} got a mask over {call.mask.shape[-1]} keys, but images "
            f"were padded to {total} tokens: masks must cover all tokens, as in the first block"
        )
    layout = runtime.layout
    mask = None if call.mask is None else layout.fold_mask(call.mask, call.q)
    for i, (image, row) in enumerate(zip(state.states, state.rows, strict=True)):
        image_index = torch.tensor([i], device=row.device)
        part = part_of(replace(call, mask=None), layout, image_index, row[None], row[None])
        if mask is not None:
            image_mask = _own_mask(mask, i, state.own.places[i])
            image_mask = image_mask if layout.form == "b h n d" else image_mask[0]
            part = without_trivial_mask(replace(part, mask=image_mask))
        yield image, part


def _own_mask(mask: Tensor, image: int, places: Tensor) -> Tensor:
    """One image's part of a mask ``[B|1, H|1, N|1, N|1]`` over all tokens."""
    mask = mask[image : image + 1] if mask.shape[0] > 1 else mask
    mask = mask if mask.shape[-1] == 1 else mask[..., places]
    return mask if mask.shape[-2] == 1 else mask[..., places, :]


def padding_among(arguments: Any, x: Tensor, prefix: int) -> tuple[bool, OwnTokens | None]:
    """Read each image's own tokens from a mask among a block's arguments.

    Args:
        arguments: Positional and keyword arguments.
        x: The sequence ``[B, N, C]``.
        prefix: Number of leading tokens that are not patches.

    Returns:
        Whether there is a mask, and each image's own tokens; None if no image has padding.
    """
    args, kwargs = arguments
    batch, tokens = x.shape[:2]
    named: list[tuple[str, Any]] = [("", value) for value in args] + list(kwargs.items())
    # no assignment expression, which Dynamo does not always follow
    candidates = [_as_mask(name, value, batch, tokens) for name, value in named]
    masks = [mask for mask in candidates if mask is not None]
    for mask in masks:
        if not mask.is_meta and hides_keys(mask):
            own = own_tokens(mask, batch, tokens, prefix)
            if own.padded:
                return True, own
    return len(masks) > 0, None


def _as_mask(name: str, value: Any, batch: int, tokens: int) -> Tensor | None:
    """An argument as a mask ``[B|1, H|1, N|1, N]``, if its shape and name fit; else None."""
    if not isinstance(value, Tensor) or value.shape[-1:] != (tokens,):
        return None
    if value.dim() == 2 and "key_padding_mask" in name and value.shape[0] == batch:
        mask = ~value if value.dtype == torch.bool else value  # True is masked, as in PyTorch
        return mask[:, None, None]
    fits = value.dim() == 4 and value.shape[0] in (1, batch) and value.shape[2] in (1, tokens)
    return value if fits and (value.dtype == torch.bool or value.is_floating_point()) else None


def padded_rows(state: PaddedTokens, rows: list[Tensor], runtime: SiteRuntime) -> Tensor:
    """One batch in the host's layout, from each image's result ``[1, H, m, Dv]``, zero-padded."""
    folded = [runtime.layout.fold(x) for x in rows]
    padded = [F.pad(x, (0, 0, 0, state.longest - x.shape[2])) for x in folded]
    out = torch.cat(padded)
    return out if runtime.layout.form == "b h n d" else out.flatten(0, 1)


def refuse_late_padding(runtime: SiteRuntime, own: OwnTokens | None) -> None:
    """Refuse padding that is found after tokens were dropped.

    Args:
        runtime: The site.
        own: Each image's own tokens; None if there is no padding.

    Raises:
        InvalidOption: There is padding.
    """
    if own is None:
        return
    raise InvalidOption(
        f"site {runtime.site.name!r} got a mask that hides padding, but tokens were dropped or "
        "merged before any attention mask showed which tokens are padding: reduce from a later "
        "block on, e.g. layers=[1, ...], or pass the mask to the block as an argument"
    )
