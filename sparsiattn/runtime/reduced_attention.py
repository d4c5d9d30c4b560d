"""Attention over a sequence that a token strategy has made shorter: masks cut down, merged tokens
weighed by size, packed images kept apart."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import canonical
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.pattern import Lengths
from sparsiattn.attention.token_state import TokenState
from sparsiattn.kernels.base import choose
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.sdpa_intercept import THREAD
from sparsiattn.runtime.site_runtime import Operands, Options, SiteRuntime
from sparsiattn.strategies.base import Planner


def attention(
    runtime: SiteRuntime,
    planner: Planner,
    token_state: TokenState | PackedTokens,
    operands: Operands,
    options: Options,
) -> Tensor:
    """What stands in for the host's call, in the host's layout."""
    if isinstance(token_state, PackedTokens):
        return _packed(runtime, planner, token_state, operands, options)
    q, k, v, mask = operands
    mask = with_size(token_state, None if mask is None else token_state.fit_mask(mask), q, runtime)
    if token_state.policy is not None:
        return _by_policy(runtime, planner, token_state, (q, k, v, mask), options)
    out = runtime.serve(planner, token_state, (q, k, v, mask), options)
    return runtime.host((q, k, v, mask), options) if out is None else out


def with_size(
    token_state: TokenState, mask: Tensor | None, q: Tensor, runtime: SiteRuntime
) -> Tensor | None:
    """The host's mask plus the log size of every key, where attention is proportional."""
    log = token_state.log_size(q.dtype) if runtime.owner.proportional else None
    if log is None:
        return mask
    if mask is None:
        return log
    if mask.dtype == torch.bool:
        return torch.where(mask, log, float("-inf"))
    return mask + log


def _by_policy(
    runtime: SiteRuntime,
    planner: Planner,
    token_state: TokenState,
    operands: Operands,
    options: Options,
) -> Tensor:
    """Softmax whose keys weigh as much as a differentiable policy says (DynamicViT, 3.3).

    One fused call instead of the attention matrix: values carry the weight and one channel more
    that sums it up. The published code also lets a dropped query see itself; nobody reads its row.
    """
    q, k, v, mask = operands
    assert token_state.policy is not None
    weight = torch.nn.functional.pad(token_state.policy, (token_state.prefix, 0), value=1.0)
    weight = weight[:, None, :, None].to(v.dtype).expand(*v.shape[:-1], 1)
    weighed = torch.cat([v * weight, weight], dim=-1)
    out = runtime.serve(planner, token_state, (q, k, weighed, mask), options)
    if out is None:
        out = runtime.host((q, k, weighed, mask), options)
    return out[..., :-1] / out[..., -1:].clamp_min(1e-6)


def _packed(
    runtime: SiteRuntime,
    planner: Planner,
    token_state: PackedTokens,
    operands: Operands,
    options: Options,
) -> Tensor:
    """Every image for itself: in one call of a ragged kernel where nothing else is to be done."""
    q, k, v, mask = operands
    parts = [
        (one, (q[..., where, :], k[..., where, :], v[..., where, :], _of_image(mask, i)))
        for i, (one, where) in enumerate(
            zip(token_state.streams, token_state.slices(), strict=True)
        )
    ]
    if THREAD.asks and THREAD.asked is None:
        THREAD.asked = [_inputs(runtime, one, part, options) for one, part in parts]
    plain = mask is None and not runtime.owner.proportional and THREAD.observer is None
    if plain and runtime.idle(max(token_state.lengths)):
        inputs = _inputs(runtime, None, operands, options)
        pattern = Lengths(q.shape[-2], k.shape[-2], token_state.lengths)
        # which keys to see was not asked of a kernel by name, so any may keep images apart
        kernels = runtime.kernels
        if kernels[0].why_not(inputs, pattern):
            kernels = tuple(REGISTRY.all("kernels").values())
        choice = choose(kernels, inputs, pattern, explicit=False)
        return runtime.layout.unfold(runtime.compute(choice, inputs, pattern), q)
    return torch.cat([attention(runtime, planner, *part, options) for part in parts], dim=-2)


def _of_image(mask: Tensor | None, i: int) -> Tensor | None:
    """One image's part of a host mask that has a batch axis."""
    if mask is None or mask.dim() < 4 or mask.shape[0] == 1:
        return mask
    return mask[i : i + 1]


def _inputs(
    runtime: SiteRuntime, token_state: TokenState | None, operands: Operands, options: Options
) -> AttentionInputs:
    q, k, v, mask = operands
    if token_state is not None:
        mask = with_size(
            token_state, None if mask is None else token_state.fit_mask(mask), q, runtime
        )
    return canonical(
        runtime.site, runtime.layout, q, k, v, mask, None,
        dropout=options[0], causal=options[1], scale=options[2], token_state=token_state,
    )  # fmt: skip
