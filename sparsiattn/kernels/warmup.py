"""Warm-up: kernels that compile do so before the call that needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels.base import Kernel, refusals
from sparsiattn.kernels.cost import reload


def warm_kernels(
    kernels: Sequence[Kernel], inputs: AttentionInputs, pattern: Pattern, *, training: bool
) -> None:
    """Warm up kernels for one call.

    Args:
        kernels: The kernels that may be chosen.
        inputs: The operands of the call.
        pattern: The pattern to compute.
        training: Whether the model trains, so that the backward pass is needed, too.
    """
    calls = [inputs]
    if training and inputs.q.device.type != "cpu":
        calls.append(_with_gradients(inputs))
    for call in calls:
        with torch.inference_mode(False), torch.set_grad_enabled(call is not inputs):
            for kernel in _candidates(kernels, call, pattern):
                kernel.warmup(call, pattern)
    reload()  # choices may change, now that more kernels are ready


def _candidates(
    kernels: Sequence[Kernel], inputs: AttentionInputs, pattern: Pattern
) -> list[Kernel]:
    """Kernels that take the call and, once warmed up, are expected to be the fastest."""
    usable = [kernel for kernel in kernels if not refusals(kernel, inputs, pattern)]
    speeds = {kernel.name: kernel.speed(inputs, pattern) for kernel in usable}
    ready = [speeds[kernel.name] for kernel in usable if not kernel.not_ready(inputs, pattern)]
    return [kernel for kernel in usable if speeds[kernel.name] >= max(ready, default=0.0)]


def _with_gradients(inputs: AttentionInputs) -> AttentionInputs:
    with torch.inference_mode(False):
        # cloned, because an inference tensor cannot require a gradient
        q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return inputs.replace(q=q, k=k, v=v)
