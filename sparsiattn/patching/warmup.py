"""`Patch.warmup`: kernels that compile do so before the first real forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sparsiattn.attention.patterns import Pattern
from sparsiattn.attention.site import AttentionInputs
from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.base import Kernel, refusals
from sparsiattn.kernels.cost import reload
from sparsiattn.patching.model_call import arguments
from sparsiattn.runtime.sdpa_intercept import THREAD

if TYPE_CHECKING:
    from sparsiattn.runtime.handle import Patch


def warmup(handle: Patch, inputs: Any) -> None:
    """One forward pass whose patched sites let every kernel get ready; see `Patch.warmup`."""
    if handle.key in THREAD.disabled or THREAD.observer is not None:
        raise InvalidOption(
            "warmup() inside disabled() or observing() would run dense attention and warm up "
            "nothing; leave that block first"
        )
    args, kwargs = arguments(inputs, "warmup")
    with torch.no_grad(), unchanged(handle), _warming(handle.key):
        handle.model(*args, **kwargs)


def warm(
    kernels: tuple[Kernel, ...], inputs: AttentionInputs, pattern: Pattern, *, training: bool
) -> None:
    """Let kernels get ready for one call, and for its backward pass where the model trains."""
    calls = [inputs]
    if training and inputs.q.device.type != "cpu":
        calls.append(_with_gradients(inputs))
    for call in calls:
        with torch.inference_mode(False), torch.set_grad_enabled(call is not inputs):
            for kernel in _candidates(kernels, call, pattern):
                kernel.warmup(call, pattern)
    reload()  # kernels that are ready now may be taken where others were


def _candidates(
    kernels: tuple[Kernel, ...], inputs: AttentionInputs, pattern: Pattern
) -> list[Kernel]:
    """Those that take the call and, once ready, expect to be the fastest: no other is worth it."""
    usable = [k for k in kernels if not refusals(k, inputs, pattern)]
    speeds = {k.name: k.speed(inputs, pattern) for k in usable}
    ready = [speeds[k.name] for k in usable if not k.not_ready(inputs, pattern)]
    return [k for k in usable if speeds[k.name] >= max(ready, default=0.0)]


def _with_gradients(inputs: AttentionInputs) -> AttentionInputs:
    with torch.inference_mode(False):
        # copied, because an inference tensor can never want a gradient
        q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return inputs.replace(q=q, k=k, v=v)


@contextmanager
def _warming(key: int) -> Iterator[None]:
    before, THREAD.warming = THREAD.warming, key
    try:
        yield
    finally:
        THREAD.warming = before


@contextmanager
def unchanged(handle: Patch) -> Iterator[None]:
    """Buffers (a training model counts batches), random numbers and what `Patch.source` tells of
    the last real forward pass are afterwards what they were."""
    training = handle.model.training
    buffers = [(x, x.clone()) for x in handle.model.buffers()] if training else []
    carried, image, seen = handle.carried, handle.image, THREAD.image
    devices = {x.device for x in handle.model.parameters() if x.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        with torch.no_grad():
            for held, value in buffers:
                held.copy_(value)
        handle.carried, handle.image, THREAD.image = carried, image, seen
