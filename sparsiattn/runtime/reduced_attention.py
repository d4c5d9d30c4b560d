"""Attention over a sequence that a token strategy has made shorter.

Masks are cut down, merged tokens weigh by their size, packed images are kept apart.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import HostCall, canonical
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.pattern import Lengths
from sparsiattn.attention.token_state import TokenState
from sparsiattn.kernels.base import choose
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime import settings
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.runtime.thread_state import BLOCK_CALL, Carried
from sparsiattn.strategies.base import Planner


def reduced_attention(
    runtime: SiteRuntime, planner: Planner, state: Carried, call: HostCall
) -> Tensor:
    """What stands in for the host's call, in the host's layout."""
    if isinstance(state, PackedTokens):
        return _packed(runtime, planner, state, call)
    call = _fitted(runtime, state, call)
    if state.policy is not None:
        return _by_policy(runtime, planner, state, call)
    return runtime.attention(planner, call, state)


def _fitted(runtime: SiteRuntime, state: TokenState, call: HostCall) -> HostCall:
    """The call with its mask cut down, plus the log size of every key if merged tokens weigh."""
    mask = None if call.mask is None else state.fit_mask(call.mask)
    log_size = state.log_size(call.q.dtype) if runtime.owner.proportional else None
    if log_size is None:
        pass
    elif mask is None:
        mask = log_size
    elif mask.dtype == torch.bool:
        mask = torch.where(mask, log_size, float("-inf"))
    else:
        mask = mask + log_size
    return replace(call, mask=mask)


def _by_policy(runtime: SiteRuntime, planner: Planner, state: TokenState, call: HostCall) -> Tensor:
    """Softmax whose keys weigh as much as a differentiable policy says (DynamicViT, 3.3).

    One fused call instead of the attention matrix: values carry the weight and one channel more
    that sums it up. The published code also lets a dropped query see itself; nobody reads its row.
    """
    assert state.policy is not None
    weight = F.pad(state.policy, (state.prefix, 0), value=1.0)
    weight = weight[:, None, :, None].to(call.v.dtype).expand(*call.v.shape[:-1], 1)
    weighted = replace(call, v=torch.cat([call.v * weight, weight], dim=-1))
    out = runtime.attention(planner, weighted, state)
    return out[..., :-1] / out[..., -1:].clamp_min(1e-6)


def _packed(runtime: SiteRuntime, planner: Planner, packed: PackedTokens, call: HostCall) -> Tensor:
    """Every image for itself: in one call of a ragged kernel where nothing else is to be done."""
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
    # which keys to see was not asked of a kernel by name, so any may keep images apart
    kernels = runtime.kernels
    if kernels[0].why_not(inputs, pattern):
        kernels = tuple(REGISTRY.all("kernels").values())
    choice = choose(kernels, inputs, pattern, explicit=False)
    return runtime.layout.unfold(runtime.compute(choice, inputs, pattern), call.q)


def _inputs(runtime: SiteRuntime, call: HostCall, state: TokenState | None) -> AttentionInputs:
    """Operands of packed images, which have neither grid nor tiles."""
    return canonical(runtime.site, runtime.layout, call, None, token_state=state)


def _of_image(call: HostCall, i: int, where: slice) -> HostCall:
    """One image's part of a packed call; the host's mask may have a batch axis."""
    q, k, v = (x[..., where, :] for x in (call.q, call.k, call.v))
    mask = call.mask
    if mask is not None and mask.dim() >= 4 and mask.shape[0] > 1:
        mask = mask[i : i + 1]
    return replace(call, q=q, k=k, v=v, mask=mask)
