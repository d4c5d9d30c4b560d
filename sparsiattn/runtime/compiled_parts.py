"""Parts of a model that are compiled by themselves.

What one compiled part writes for the next is lost: Dynamo replays writes to a subclass of
`threading.local` into a dictionary that no thread reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.patch_state import PatchState


class RefuseCompiledParts:
    """Forward pre-hook of a model in which places hand each other state.

    Raises `ModelChanged` where such places are compiled one by one.
    """

    def __init__(self, state: PatchState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _refuse_compiled_parts(self.state, places_that_hand_on(self.state))


def _refuse_compiled_parts(state: PatchState, handing_on: list[str]) -> None:
    for name in handing_on:
        part: nn.Module = state.model
        path = ""
        for step in name.split(".") if name else ():
            part, path = part._modules[step], f"{path}{step}."  # type: ignore[assignment]
            if is_compiled(part) and not all(f"{n}.".startswith(path) for n in handing_on):
                raise ModelChanged(
                    f"{path[:-1]!r} is compiled by itself, and strategy "
                    f"{state.strategy.name!r} hands state from one such part to the next, which "
                    "compiled parts lose: compile the whole model instead, "
                    "torch.compile(model), or leave these parts uncompiled"
                )


def places_that_hand_on(state: PatchState) -> list[str]:
    """Blocks that carry fewer tokens, attention that their reductions read, and sites with
    cross-layer state."""
    names = [runtime.block.name for runtime in state.blocks]
    for block in state.blocks:
        names += block.block.sites if block.wants_attention else ()
    sites = (r for r in state.runtimes if r.strategy.uses_cross_layer_state)
    return names + [runtime.site.name for runtime in sites]


def is_compiled(module: nn.Module) -> bool:
    """Whether `nn.Module.compile` or `torch.compile` was called with this very module."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
