"""Puts planners on the device of their host's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsiattn.strategies.planner_weights import adopt_parts


def place_planner(make: Callable[[], Any], host: nn.Module, *, training: bool) -> Any:
    """The planner that ``make`` returns; a module moves to the device and dtype of its host."""
    # otherwise weights could never train (inference mode), or tables have no values (meta device)
    with torch.inference_mode(False), torch.device("cpu"):
        planner = make()
        if isinstance(planner, nn.Module):
            like = next(host.parameters(), None)
            if like is not None:
                dtype = like.dtype if like.is_floating_point() else None
                planner.to(device=_computing_device(host) or like.device, dtype=dtype)
            planner.train(training)
            adopt_parts(planner)
    return planner


def _computing_device(host: nn.Module) -> Any:
    """The device to which accelerate moves offloaded weights; None if it offloads none."""
    hooks = (vars(module).get("_hf_hook") for module in host.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)
