"""Planners live where the weights of their host are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsiattn.strategies.planner_weights import adopt_parts


def place_planner(make: Callable[[], Any], host: nn.Module, *, training: bool) -> Any:
    """What ``make`` returns, on the host's device and in its dtype if it is a module."""
    # or its weights could never train, and tables that are no weights would have no values
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
    """Where accelerate takes the weights that it keeps elsewhere, None if it keeps none."""
    hooks = (vars(module).get("_hf_hook") for module in host.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)
