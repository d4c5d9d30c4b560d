"""Trace a patched model as one program of standard operators, for any batch size."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import ExportFailed, InvalidOption
from sparsiattn.kernels.base import Kernel
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.patch_state import PatchState, state_of, unwrap
from sparsiattn.serialization.exporters.folding import fold, is_functional

KERNELS = ("gather", "sdpa", "reference")
"""Kernels of standard operators, which every runtime has. The fastest one that supports a call is
exported. Other kernels compile or launch custom code."""


def exportable_copy(model: nn.Module, kernel: str | None) -> nn.Module:
    """A copy in eval mode that shares all weights and uses kernels that can be exported.

    A copy leaves the model itself unchanged, also for other threads.

    Args:
        model: The model.
        kernel: As in `export`.

    Raises:
        InvalidOption: The patch or the kernel cannot be exported.
    """
    host = unwrap(model)
    _refuse_adaptive(state_of(host))
    weights = [*host.parameters(), *host.buffers()]
    model_copy = copy.deepcopy(host, {id(tensor): tensor for tensor in weights})
    state = state_of(model_copy)
    if state is not None:
        kernels = _kernels(state, kernel)
        for runtime in state.runtimes:
            runtime.kernels, runtime.explicit = kernels, len(kernels) == 1
    elif kernel is not None:
        raise InvalidOption(
            f"kernel={kernel!r} needs a patched model, but this model is not patched: remove it"
        )
    return model_copy.eval()


def _refuse_adaptive(state: PatchState | None) -> None:
    if state is not None and state.tokens is not None and state.tokens.is_ragged():
        raise InvalidOption(
            f"{state.tokens.name!r} with these options keeps a different number of tokens for "
            "every image, but the shapes in an exported program cannot depend on values: use a "
            "fixed budget, e.g. keep=0.7"
        )


def _kernels(state: PatchState, kernel: str | None) -> tuple[Kernel, ...]:
    named = kernel or (None if state.kernel == "auto" else state.kernel)
    kernels = tuple(REGISTRY.get("kernels", name) for name in ([named] if named else KERNELS))
    if named is not None and named not in KERNELS:
        raise InvalidOption(
            f"kernel {named!r} cannot be exported, as it runs custom code: pass kernel= one of "
            f"{', '.join(KERNELS)} to export(), or None for the fastest of them"
        )
    return kernels


def traced(model: nn.Module, images: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """Trace a model as a functional program with folded constants.

    Args:
        model: The result of `exportable_copy`.
        images: Images ``[B, C, H, W]``.
        dynamic: Whether the program takes any batch size.

    Raises:
        ExportFailed: torch.export cannot trace the model.
    """
    shapes: Any = ({0: torch.export.Dim("batch", min=1, max=65536)},) if dynamic else None
    with _readable(model), torch.no_grad():
        # two exports: constants are folded in the functional program, which is exported again
        first = torch.export.export(model, (images,), dynamic_shapes=shapes)
        if not is_functional(first.graph):
            first = first.run_decompositions({})
        module = first.module(check_guards=False)
        fold(module)
        return torch.export.export(module, (images,), dynamic_shapes=shapes)


@contextmanager
def _readable(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch.export raises many kinds of errors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportFailed(
            f"torch.export cannot trace this {type(model).__name__}: "
            f"{' '.join(lines[:3]) or type(error).__name__}"
        ) from error


def kernels_used(state: PatchState | None, images: Tensor, model: nn.Module) -> dict[str, int]:
    """Number of sites that each kernel runs at; empty if the model is not patched."""
    if state is None:
        return {}
    with torch.no_grad():
        model(images)
    choices = (runtime.last_choice for runtime in state.runtimes)
    return dict(Counter("dense" if c is None else c.kernel.name for c in choices))
