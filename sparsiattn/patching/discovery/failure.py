"""Locates the failure of a forward pass in a model."""

from __future__ import annotations

import linecache
from traceback import walk_tb

from torch import nn


def place_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module of the model that was running, and the line that failed.

    Args:
        error: The error that the forward pass raised.
        model: The model that ran.

    Returns:
        `` in blocks.0.attn (Attention), at `q @ k```; empty if no module of the model was running.
    """
    names = {id(module): name or "its own forward" for name, module in model.named_modules()}
    place = ""
    for frame, number in walk_tb(error.__traceback__):
        module, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if id(module) in names and not file.endswith("nn/modules/module.py"):
            line = linecache.getline(file, number).strip()
            place = f" in {names[id(module)]} ({type(module).__name__}), at `{line}`"
    return place
