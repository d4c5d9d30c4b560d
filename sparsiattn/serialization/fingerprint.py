"""The fingerprint of a model: its class, and the names and shapes of its weights."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from sparsiattn.runtime.site_runtime import is_planner_key


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """A fingerprint that a model must share with a saved patch; planners' weights do not count.

    Args:
        model: The model, patched or not.

    Returns:
        Name of its class, number of weights, and SHA-256 of their names and shapes.
    """
    weights = [
        f"{name}:{tuple(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if not is_planner_key(name)
    ]
    digest = hashlib.sha256("\n".join(weights).encode()).hexdigest()
    return {"class": type(model).__name__, "weights": len(weights), "sha256": digest}
