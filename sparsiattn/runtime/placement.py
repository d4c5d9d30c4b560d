"""Where a model runs."""

from __future__ import annotations

import torch
from torch import Tensor


def device_of(weight: Tensor | None) -> torch.device:
    """The device for which calls are planned, from one of the model's weights; the CPU without.

    >>> device_of(None)
    device(type='cpu')
    """
    return torch.device("cpu") if weight is None else weight.device
