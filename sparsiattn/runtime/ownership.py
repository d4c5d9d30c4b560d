"""Whose pass runs: calls of a patched model, of its parts, and of others that share them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import get_ident
from types import FrameType
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.fx import GraphModule

from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.sdpa_intercept import MODULE_CALL, abandoned, forget_caller
from sparsiattn.runtime.thread_state import MODEL_CALL, forget_models, forget_pass


def leave_model(key: int) -> None:
    """The model of that patch runs no more."""
    forget_caller(-key)
    forget_models((key,))
    forget_pass()


def is_inside(owner: PatchOwner) -> bool:
    """Whether the patched model runs, and was not interrupted."""
    if owner.key not in MODEL_CALL.inside:
        return False
    if torch.compiler.is_compiling() or not abandoned(-owner.key):
        return True
    leave_model(owner.key)
    return False


def runs_elsewhere(owner: PatchOwner) -> bool:
    """Whether another thread is in a pass of the patched model."""
    calls = list(owner.running.items())
    return any(call.exists for thread, call in calls if thread != get_ident())


def runs_in_another(owner: PatchOwner, module: nn.Module) -> bool:
    """Whether a module runs for another model that shares it with the patched one.

    A part that is called from outside is sparse, unless a module runs that holds the part and
    neither holds the patched model nor belongs to it. The patch notes such a model.

    Args:
        owner: The patch.
        module: A part of its model, in one of whose hooks this is asked.
    """
    if torch.compiler.is_compiling():
        return False
    for other in _running():
        if other is owner.model or "_is_replica" in vars(other) or isinstance(other, GraphModule):
            return False
        if other is module or _is_part(owner, other):
            continue
        held = set(other.modules())
        if module in held and owner.model not in held:
            owner.other_models.add(type(other).__name__)
            return True
    return False


_PARTS: WeakKeyDictionary[PatchOwner, WeakSet[nn.Module]] = WeakKeyDictionary()


def _is_part(owner: PatchOwner, module: nn.Module) -> bool:
    """Whether a module belongs to the patched model."""
    if module not in _PARTS.get(owner, ()):
        _PARTS[owner] = WeakSet(owner.model.modules())
    return module in _PARTS[owner]


def _running() -> Iterator[nn.Module]:
    """Modules that are being called in this thread, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # the outer of torch's two functions around a call, since locals of a frame are dear
        if frame.f_code is MODULE_CALL:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                yield module
        frame = frame.f_back
