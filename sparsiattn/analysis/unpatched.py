"""A patched model as it is without its patches: a copy, and what it was told of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from sparsiattn.errors import ProbeFailed
from sparsiattn.patching import Patch
from sparsiattn.patching.discovery.meta_model import has_data, meta_copy, value_copy
from sparsiattn.runtime.multihead import swap_back
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE, live_patches
from sparsiattn.runtime.restore import unwatch
from sparsiattn.runtime.site_runtime import PLANNER

T = TypeVar("T")


def survey_unpatched(
    model: nn.Module, patches: list[Patch], look: Callable[[nn.Module], T]
) -> tuple[nn.Module, T]:
    """A copy without patches, and what was found in it; it has no data if the model runs without.

    Args:
        model: The model.
        patches: Its live patches.
        look: Takes the copy.
    """
    copied = unpatched_meta_copy(model, patches)
    try:
        return copied, look(copied)
    except ProbeFailed:
        if not has_data(model):
            raise
    copied = _unpatched(model, value_copy(model), patches)
    return copied, look(copied)


def patches_in(model: nn.Module) -> list[Patch]:
    """Live patches of a model and of its parts, each once."""
    return list(dict.fromkeys(patch for _, patch in live_patches(model)))


def unpatched_meta_copy(model: nn.Module, patches: list[Patch]) -> nn.Module:
    """A copy of a model without data and without the marks of these patches."""
    return _unpatched(model, meta_copy(model), patches)


def _unpatched(model: nn.Module, copied_model: nn.Module, patches: list[Patch]) -> nn.Module:
    """A copy that still carries the marks of these patches, without them."""
    planners = {id(runtime.planner) for patch in patches for runtime in patch.runtimes}
    # listed, because the loop takes modules out
    for module, copied in zip(model.modules(), list(copied_model.modules()), strict=True):
        if id(module._modules.get(PLANNER)) in planners:
            del copied._modules[PLANNER]
        unwatch(copied)
        swap_back(copied)
        vars(copied).pop(PATCH_ATTRIBUTE, None)
    return copied_model


def example_input(model: nn.Module, example: Any, patches: list[Patch]) -> Any:
    """The input to describe a model for: where none is given, that of the model's own patch."""
    examples = [
        patch.attention.example
        for patch in patches
        if patch.model is model and not patch.follows_model
    ]
    return examples[0] if example is None and examples else example
