"""Whose pass runs: calls of a patched model, of its parts, and of others that share them."""

from __future__ import annotations

import sys
from threading import get_ident
from types import FrameType
from weakref import ref

import torch
from torch import nn
from torch.fx import GraphModule

from sparsiattn.runtime.open_call import OpenCall
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.sdpa_intercept import (
    HOOKED_CALL,
    MODULE_CALL,
    OUTER_CALL,
    abandoned,
    forget_caller,
)
from sparsiattn.runtime.thread_state import MODEL_CALL, SITE_CALLS, forget_models, forget_pass


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
    return surroundings(owner, module, sys._getframe(2))[0]


def surroundings(
    owner: PatchOwner, module: nn.Module, caller: FrameType | None
) -> tuple[bool, OpenCall | None]:
    """What `runs_in_another` says of an eager call, and the call of the model that it is part of.

    The call is None where the part runs by itself or for another model.

    Args:
        owner: The patch.
        module: A part of its model.
        caller: Who called its hook.
    """
    model_call = SITE_CALLS.callers.get(-owner.key)
    number = model_call.number if isinstance(model_call, OpenCall) else None
    frame = caller
    while frame is not None:
        code = frame.f_code
        if code is HOOKED_CALL and frame is caller and frame.f_back is not None:
            frame = frame.f_back.f_back  # that is the call of this very module
            continue
        if code is HOOKED_CALL and id(frame) == number:
            if isinstance(model_call, OpenCall) and model_call.exists:
                return False, model_call
        elif _names_module(frame):
            other = frame.f_locals.get("self")
            if other is owner.model:
                return False, None
            if isinstance(other, nn.Module) and other is not module and not _is_part(owner, other):
                if "_is_replica" in vars(other) or isinstance(other, GraphModule):
                    return False, None
                if _shares(owner, module, other):
                    return True, None
        frame = frame.f_back
    return False, None


def _names_module(frame: FrameType) -> bool:
    """Whether this is the frame of a module's call with the fewest locals, which are dear."""
    code = frame.f_code
    if code is not MODULE_CALL:
        return code is OUTER_CALL
    return frame.f_back is None or frame.f_back.f_code is not OUTER_CALL


def _shares(owner: PatchOwner, module: nn.Module, other: nn.Module) -> bool:
    """Whether another model holds the module and not the patched model; it is noted then."""
    held = set(other.modules())
    if module not in held or owner.model in held:
        return False
    owner.other_models.add(type(other).__name__)
    return True


def _is_part(owner: PatchOwner, module: nn.Module) -> bool:
    """Whether a module belongs to the patched model, and is no traced program."""
    if ref(module) in owner.parts:
        return True
    owner.parts = {ref(m) for m in owner.model.modules() if not isinstance(m, GraphModule)}
    return ref(module) in owner.parts
