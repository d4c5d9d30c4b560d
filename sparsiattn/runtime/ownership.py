"""Which model a running call belongs to: the patched one, or another that shares its modules."""

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
    """Clean up after the patched model's pass has ended."""
    forget_caller(-key)
    forget_models((key,))
    forget_pass()


def is_inside(owner: PatchOwner) -> bool:
    """Whether the patched model is running and was not interrupted."""
    if owner.key not in MODEL_CALL.inside:
        return False
    if torch.compiler.is_compiling() or not abandoned(-owner.key):
        return True
    leave_model(owner.key)
    return False


def runs_elsewhere(owner: PatchOwner) -> bool:
    """Whether another thread is running the patched model."""
    calls = list(owner.running.items())
    return any(call.exists for thread, call in calls if thread != get_ident())


def runs_in_another(owner: PatchOwner, module: nn.Module) -> bool:
    """Whether a module is called by another model that shares it with the patched model.

    A submodule that is called on its own is sparse. It is dense if another model calls it: a
    running module that contains the submodule, does not contain the patched model, and is not part
    of it. The patch notes such models.

    Args:
        owner: The patch.
        module: A submodule of the patched model; the caller is one of its hooks.
    """
    if torch.compiler.is_compiling():
        return False
    return surroundings(owner, module, sys._getframe(2))[0]


def surroundings(
    owner: PatchOwner, module: nn.Module, caller: FrameType | None
) -> tuple[bool, OpenCall | None]:
    """Whether another model calls a module, and the call of the patched model that contains it.

    Eager calls only, see `runs_in_another`.

    Args:
        owner: The patch.
        module: A submodule of the patched model.
        caller: The frame that called its hook.

    Returns:
        Whether the module runs in another model, and the patched model's call; None if the module
        runs on its own or in another model.
    """
    model_call = SITE_CALLS.callers.get(-owner.key)
    number = model_call.number if isinstance(model_call, OpenCall) else None
    frame = caller
    while frame is not None:
        code = frame.f_code
        if code is HOOKED_CALL and frame is caller and frame.f_back is not None:
            frame = frame.f_back.f_back  # skip the frames of this module's own call
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
    """Whether to read the module from this frame: the one with the fewest locals, for speed."""
    code = frame.f_code
    if code is not MODULE_CALL:
        return code is OUTER_CALL
    return frame.f_back is None or frame.f_back.f_code is not OUTER_CALL


def _shares(owner: PatchOwner, module: nn.Module, other: nn.Module) -> bool:
    """Whether another model contains the module but not the patched model; notes such a model."""
    modules = set(other.modules())
    if module not in modules or owner.model in modules:
        return False
    owner.other_models.add(type(other).__name__)
    return True


def _is_part(owner: PatchOwner, module: nn.Module) -> bool:
    """Whether a module belongs to the patched model and is not a traced program."""
    if ref(module) in owner.parts:
        return True
    owner.parts = {ref(m) for m in owner.model.modules() if not isinstance(m, GraphModule)}
    return ref(module) in owner.parts
