"""Attention over a sequence that a token strategy has shortened.

Masks are reduced to the remaining tokens, merged tokens are weighted by their size, and packed
images attend separately.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import HostCall, Maps, canonical
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.packing import PackedPart
from sparsiattn.attention.padded import PaddedTokens
from sparsiattn.attention.padding import OwnTokens, with_explicit_mask
from sparsiattn.attention.token_state import TokenState
from sparsiattn.kernels.base import choose
from sparsiattn.kernels.native import biased
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime import settings
from sparsiattn.runtime.padded_attention import (
    attend_own,
    begin_padded,
    find_own_tokens,
    image_calls,
    padded_rows,
    refuse_late_padding,
)
from sparsiattn.runtime.site_runtime import Decision, SiteRuntime
from sparsiattn.runtime.thread_state import BLOCK_CALL, Carried
from sparsiattn.strategies.base import Planner


@dataclass(frozen=True, eq=False)
class ProportionalCall(HostCall):
    """A call whose mask is only the log size of merged tokens, ``[B, 1, 1, N]``."""

    def dense(self) -> Tensor:
        operands = self.q, self.k, self.v
        if self.causal or self.dropout or not biased.serves_call(*operands):
            return super().dense()
        assert self.mask is not None
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return biased.key_biased(*operands, self.mask[:, 0, 0], scale)


def reduced_attention(
    runtime: SiteRuntime, planner: Planner, state: Carried, call: HostCall
) -> Tensor:
    """The result of a host's call over a shortened sequence, in the host's layout."""
    if isinstance(state, PaddedTokens):
        return _padded(runtime, planner, state, call)
    if isinstance(state, PackedTokens):
        return _packed(runtime, planner, state, call)
    if call.mask is not None:
        call = replace(call, mask=state.fit_mask(call.mask))
    call, own = _found_padding(runtime, call)
    if own is not None and not state.reduced and state.policy is None:
        padded = BLOCK_CALL.token_state = begin_padded(
            runtime.site, runtime.owner.maps(), state, own
        )
        return _padded(runtime, planner, padded, call)
    refuse_late_padding(runtime, own)
    return _of_state(runtime, planner, state, call)


def full_attention(
    runtime: SiteRuntime,
    planner: Planner,
    call: HostCall,
    part: PackedPart | None = None,
    group: Hashable = None,
) -> Tensor:
    """The result of a host's call over a sequence with every token, in the host's layout.

    Args:
        runtime: The site.
        planner: Its planner.
        call: The host's arguments.
        part: As in `canonical`.
        group: Identifies the image of this call, if several attend separately.
    """
    if runtime.decide(call.k.shape[-2]) is Decision.HOST:
        return runtime.host(call)
    call, own = find_own_tokens(runtime, call)
    if own is not None:
        return attend_own(runtime, planner, call, own)
    return runtime.attention(planner, call, group=group, part=part)


def _found_padding(runtime: SiteRuntime, call: HostCall) -> tuple[HostCall, OwnTokens | None]:
    """As `find_own_tokens`; also notes that later consumers of tokens may depend on the mask."""
    has_mask = call.mask is not None
    call, own = find_own_tokens(runtime, call, reduces=True)
    if own is not None or (has_mask and runtime.site.bias == "none"):
        BLOCK_CALL.masked = True
    return call, own


def _of_state(
    runtime: SiteRuntime,
    planner: Planner,
    state: TokenState,
    call: HostCall,
    group: Hashable = None,
) -> Tensor:
    """Attention of images with the same number of tokens."""
    call = _fitted(runtime, state, call)
    if state.policy is not None:
        return _by_policy(runtime, planner, state, call, group)
    return runtime.attention(planner, call, state, group)


def _padded(
    runtime: SiteRuntime,
    planner: Planner,
    padded: PaddedTokens,
    call: HostCall,
) -> Tensor:
    """Attention of a padded batch: each image's own tokens attend to each other."""
    BLOCK_CALL.masked = True
    if BLOCK_CALL.wants_attention and BLOCK_CALL.attention is None:
        maps = runtime.owner.maps()
        BLOCK_CALL.attention = [
            _inputs(runtime, _fitted(runtime, state, part), state, maps)
            for state, part in image_calls(runtime, padded, call)
        ]
    if not padded.reduced and padded.policy is None:
        call = call if call.mask is None else with_explicit_mask(call, runtime.layout)
        return attend_own(runtime, planner, call, padded.own)
    rows = [
        _of_state(runtime, planner, state, part, ("image", i))
        for i, (state, part) in enumerate(image_calls(runtime, padded, call))
    ]
    return padded_rows(padded, rows, runtime)


def _fitted(runtime: SiteRuntime, state: TokenState, call: HostCall) -> HostCall:
    """The call with its mask reduced; proportional attention adds the log size of every key."""
    mask = None if call.mask is None else state.fit_mask(call.mask)
    log_size = state.log_size(call.q.dtype) if runtime.owner.proportional else None
    if log_size is None:
        pass
    elif mask is None:
        # field by field: Dynamo before torch 2.11 cannot trace `vars`
        operands = call.q, call.k, call.v, log_size, call.dropout, call.causal
        return ProportionalCall(*operands, scale=call.scale, gqa=call.gqa)
    elif mask.dtype == torch.bool:
        mask = torch.where(mask, log_size, float("-inf"))
    else:
        mask = mask + log_size
    return replace(call, mask=mask)


def _by_policy(
    runtime: SiteRuntime,
    planner: Planner,
    state: TokenState,
    call: HostCall,
    group: Hashable = None,
) -> Tensor:
    """Softmax with keys weighted by a differentiable policy (DynamicViT, section 3.3).

    One fused call replaces the attention matrix: values are multiplied by the weights, and one
    more channel sums the weights. The published code also lets a dropped query attend to itself;
    its row is never used, so this is left out.
    """
    assert state.policy is not None
    weight = F.pad(state.policy, (state.prefix, state.suffix), value=1.0)
    weight = weight[:, None, :, None].to(call.v.dtype).expand(*call.v.shape[:-1], 1)
    weighted = replace(call, v=torch.cat([call.v * weight, weight], dim=-1))
    out = runtime.attention(planner, weighted, state, group)
    return out[..., :-1] / out[..., -1:].clamp_min(1e-6)


def _packed(runtime: SiteRuntime, planner: Planner, packed: PackedTokens, call: HostCall) -> Tensor:
    """Attention of packed images, each separately; one call of a ragged kernel if it is dense."""
    images = [
        (state, _of_image(call, i, where))
        for i, (state, where) in enumerate(zip(packed.states, packed.slices(), strict=True))
    ]
    if BLOCK_CALL.wants_attention and BLOCK_CALL.attention is None:
        BLOCK_CALL.attention = [
            _inputs(runtime, _fitted(runtime, state, part), state) for state, part in images
        ]
    plain = call.mask is None and not runtime.owner.proportional and settings.observer is None
    if plain and runtime.stays_dense(max(packed.lengths)):
        return _by_ragged_kernel(runtime, packed, call)
    rows = [reduced_attention(runtime, planner, state, part) for state, part in images]
    return torch.cat(rows, dim=-2)


def _by_ragged_kernel(runtime: SiteRuntime, packed: PackedTokens, call: HostCall) -> Tensor:
    """Dense attention of all images in one call."""
    inputs = _inputs(runtime, call, None)
    pattern = Lengths(call.q.shape[-2], call.k.shape[-2], packed.lengths)
    # the user's kernel may not support ragged batches; dense attention may use any kernel
    kernels = runtime.kernels
    if kernels[0].why_not(inputs, pattern):
        kernels = tuple(REGISTRY.all("kernels").values())
    choice = choose(kernels, inputs, pattern, explicit=False)
    return runtime.layout.unfold(runtime.compute(choice, inputs, pattern), call.q)


def _inputs(
    runtime: SiteRuntime, call: HostCall, state: TokenState | None, maps: Maps | None = None
) -> AttentionInputs:
    """Operands of a call without tiles; for packed images also without a grid."""
    return canonical(runtime.site, runtime.layout, call, maps, token_state=state)


def _of_image(call: HostCall, i: int, where: slice) -> HostCall:
    """One image's part of a packed call; the host's mask may have a batch axis."""
    q, k, v = (x[..., where, :] for x in (call.q, call.k, call.v))
    mask = call.mask
    if mask is not None and mask.dim() >= 4 and mask.shape[0] > 1:
        mask = mask[i : i + 1]
    return replace(call, q=q, k=k, v=v, mask=mask)
