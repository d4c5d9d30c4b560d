"""`Patch.warmup`: compiles kernels before the first real forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.native import build
from sparsiattn.patching.model_call import arguments
from sparsiattn.runtime import settings
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.runtime.thread_state import MODEL_CALL


def warmup(state: PatchState, inputs: Any) -> None:
    """Run one forward pass in which patched sites warm up their kernels; see `Patch.warmup`."""
    if state.disabled_here or settings.observer is not None:
        raise InvalidOption(
            "warmup() inside disabled() or observing() would run dense attention and warm up "
            "nothing; call it outside of that block"
        )
    args, kwargs = arguments(inputs, "warmup")
    if state.tokens is not None and state.tokens.merges():
        _compile_merging(state)
    with torch.no_grad(), unchanged(state), settings.setting("warming", state.key):
        state.model(*args, **kwargs)


def _compile_merging(state: PatchState) -> None:
    """Compile the code for merging tokens, which no kernel's warm-up covers.

    Without a compiler, merging uses torch operations.
    """
    first = next(state.model.parameters(), None)
    if first is not None and first.is_cpu and first.dtype is torch.float32:
        build.compile_here()


@contextmanager
def unchanged(state: PatchState) -> Iterator[None]:
    """Restore buffers, random number generators and the record of the last pass on exit.

    Buffers change in training mode, for example those that count batches.
    """
    buffers = [(x, x.clone()) for x in state.model.buffers()] if state.training else []
    last_pass, image, thread_image = state.last_pass, state.image, MODEL_CALL.image
    devices = {x.device for x in state.model.parameters() if x.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        state.last_pass, state.image, MODEL_CALL.image = last_pass, image, thread_image
