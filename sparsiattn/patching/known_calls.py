"""Call signatures of a model, and whether such a call needs every position of the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from sparsiattn.attention.block import Block
from sparsiattn.attention.site import Site
from sparsiattn.errors import ProbeFailed
from sparsiattn.patching.discovery.backbone import backbone_named
from sparsiattn.patching.discovery.consumers import Consumers
from sparsiattn.patching.discovery.meta_model import MetaInputs, meta_copy
from sparsiattn.patching.survey import ModelSurvey
from sparsiattn.patching.towers import consumers_of
from sparsiattn.runtime.call_key import call_key
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.runtime.restore import modules_with_features, unwatch


def know_call(state: PatchState, surveyed: ModelSurvey) -> None:
    """Record the call that dry runs make as one that does not need every position.

    Args:
        state: The patch.
        surveyed: The survey of the model.
    """
    parameters = signature(type(state.model).forward).parameters
    names = list(parameters)[1:]
    state.parameters = tuple(n for n in names if parameters[n].kind != Parameter.VAR_POSITIONAL)
    state.defaults = {n: parameters[n].default for n in names}
    inputs = _inputs(state, surveyed)
    state.known_calls[call_key(state, *inputs, training=False)] = False


def know_training(state: PatchState, surveyed: ModelSurvey) -> None:
    """Record whether the same call needs every position while the model trains."""
    inputs = _inputs(state, surveyed)
    surveyed.meta_model.train()
    try:
        needs = _trace_needs(state, surveyed.meta_model, inputs)
    except ProbeFailed:
        needs = True
    surveyed.meta_model.eval()
    state.known_calls[call_key(state, *inputs, training=True)] = needs


def _inputs(state: PatchState, surveyed: ModelSurvey) -> MetaInputs:
    return surveyed.inputs()


def call_needs_all(state: PatchState, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model with these arguments needs every position of the sequence.

    A copy on the meta device is called with the same arguments. If it cannot run, the answer is
    True.
    """
    if torch._C._get_tracing_state() is not None or not _is_plain((args, kwargs)):
        return True
    with _disable_current_modes(), torch.inference_mode(False):
        try:
            meta_model = meta_copy(state.model)
            for module in modules_with_features(state, meta_model):
                unwatch(module)
            for override in backbone_named(state.backbone).attribute_overrides(meta_model):
                override.apply()
            meta_model.train(state.model.training)
            return _trace_needs(state, meta_model, tree_map(_without_data, (args, dict(kwargs))))
        except ProbeFailed:
            return True


def _trace_needs(state: PatchState, meta_model: Any, inputs: MetaInputs) -> bool:
    blocks: list[Block] = [block.block for block in state.blocks]
    sites: dict[str, Site] = {site.name: site for site in state.model_sites}
    consumers = consumers_of(meta_model, blocks, sites, inputs)
    assert state.tokens is not None
    uneven = state.tokens.merges() or state.tokens.is_ragged()
    return _runs_otherwise(state, consumers) or any(
        consumers.need_all(number, uneven) and not block.restores
        for number, block in enumerate(state.blocks)
    )


def _runs_otherwise(state: PatchState, consumers: Consumers) -> bool:
    """Whether blocks pass the sequence on in a different order than the patch expects."""
    for run in consumers.runs:
        block = state.blocks[run.block]
        before = None if run.before is None else consumers.runs[run.before].block
        follows = before == run.block - 1 if not block.first else before is None
        if not follows and not (block.repeated and (block.first or run.handed)):
            return True
    return False


def _is_plain(values: Any) -> bool:
    """Whether all tensors are plain tensors outside of `torch.func` transforms."""
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors_in(values)
    )


def _without_data(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_like(value, device="meta", requires_grad=False)
