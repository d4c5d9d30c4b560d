"""What planners leave for later sites of the same forward pass, and how a checkpointed block that
runs again in the backward pass finds it."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.site import Site
from sparsiattn.errors import ModelChanged
from sparsiattn.patching.discovery.blocks import first_tensor
from sparsiattn.runtime.sdpa_intercept import THREAD


def notes_at(runtime: Any) -> CrossLayerState:
    """A copy of the notes of this forward pass for one site to read and write, then to be left by
    `leave`: Dynamo lets no checkpoint change an object from before it."""
    site: Site = runtime.site
    key = runtime.owner.key
    packed = THREAD.token_state is not None and hasattr(THREAD.token_state, "streams")
    if site.calls > 1 or packed:
        return CrossLayerState(key, forgets=True)
    notes: CrossLayerState | None = THREAD.notes
    if notes is not None and notes.owner == key:
        return notes.copy()
    if not (torch.compiler.is_compiling() or runtime.opens) and _in_backward():
        raise ModelChanged(
            f"site {site.name!r} runs again in a backward pass, and what earlier blocks kept for "
            "it cannot be found: checkpoint whole blocks, or use a strategy that keeps nothing"
        )
    return CrossLayerState(key)


def leave(notes: CrossLayerState | None) -> None:
    """Hand a site's notes on to those that follow."""
    if notes is not None and not notes.forgets:
        THREAD.notes = notes


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() >= 0)


class NoteEntry:
    """Forward pre-hook of whatever a checkpoint may run again: notes what had been kept when this
    very tensor came in, and brings it back when it comes again."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.entered: dict[int, tuple[Any, CrossLayerState]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entered": {}}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self.owner.key in THREAD.disabled:
            return
        x = first_tensor(args) if args else first_tensor(kwargs)
        if x is None or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        known = self.entered.get(x.data_ptr())
        if known is not None and known[0]() is not None:
            THREAD.notes = known[1].copy()
        elif torch.is_grad_enabled() or x.requires_grad:
            self._note(x)

    def _note(self, x: Tensor) -> None:
        notes = THREAD.notes
        for key in [key for key, (alive, _) in self.entered.items() if alive() is None]:
            del self.entered[key]
        if notes is not None and notes.owner == self.owner.key and notes.tensors:
            self.entered[x.data_ptr()] = (ref(x), notes.copy())


def enclosing(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """Modules around the sites, each once, and what is called in them: a checkpoint may run a whole
    block again, or only what is inside its forward."""
    found: dict[int, nn.Module] = {}
    for site in sites:
        names = site.name.split(".")
        for i in range(1, len(names)):
            around = model.get_submodule(".".join(names[:i]))
            for module in (around, *around.children()):
                found[id(module)] = module
    return list(found.values())
