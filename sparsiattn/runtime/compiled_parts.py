"""Refuse parts of a model that are compiled separately.

State that one compiled part writes for the next is lost: Dynamo replays writes to a subclass of
`threading.local` into a dictionary that no thread reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.patch_state import PatchState


class RefuseCompiledParts:
    """Forward pre-hook of a model in which modules pass state on to later modules.

    Raises `ModelChanged` if such modules are compiled separately.
    """

    def __init__(self, state: PatchState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _refuse_compiled_parts(self.state, places_that_hand_on(self.state))


def _refuse_compiled_parts(state: PatchState, names: list[str]) -> None:
    for name in names:
        part: nn.Module = state.model
        path = ""
        for step in name.split(".") if name else ():
            part, path = part._modules[step], f"{path}{step}."  # type: ignore[assignment]
            if is_compiled(part) and not all(f"{n}.".startswith(path) for n in names):
                raise ModelChanged(
                    f"{path[:-1]!r} is compiled separately, but strategy "
                    f"{state.strategy.name!r} passes state from one such part to the next, and "
                    "separately compiled parts lose it: compile the whole model with "
                    "torch.compile(model), or leave these parts uncompiled"
                )


def places_that_hand_on(state: PatchState) -> list[str]:
    """Names of the modules that pass state on.

    These are blocks that carry fewer tokens, attention that their reductions read, and sites with
    cross-layer state.
    """
    names = [runtime.block.name for runtime in state.blocks]
    for block in state.blocks:
        names += block.block.sites if block.wants_attention else ()
    sites = (r for r in state.runtimes if r.strategy.uses_cross_layer_state)
    return names + [runtime.site.name for runtime in sites]


def is_compiled(module: nn.Module) -> bool:
    """Whether `nn.Module.compile` or `torch.compile` was called on this module itself."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
