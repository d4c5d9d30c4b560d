"""Lines of a report about speed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsiattn.kernels import cost, tuning_cache
from sparsiattn.patching.text import speed_text
from sparsiattn.runtime import placement

# A model below this speed is expected to be slower; closer to 1.0 the estimate is too coarse.
SLOWER = 0.98

# devices with kernels of this library; "meta" stands for any device
SERVED = frozenset({"cpu", "cuda", "meta"})


def no_fast_kernel(device: str) -> str:
    """A note for models on a device without a fast kernel; empty for other devices.

    Args:
        device: The type of the device.

    >>> no_fast_kernel("mps"), no_fast_kernel("cpu")
    ('no fast kernel for mps: sparse attention saves MACs there, not time', '')
    """
    if device in SERVED:
        return ""
    return f"no fast kernel for {device}: sparse attention saves MACs there, not time"


def loses_time(speed: float, instead: Sequence[str], origin: str = "") -> str:
    """A note for models that are expected to be slower than dense; empty for others.

    Args:
        speed: Expected speed of the model relative to dense.
        instead: Alternatives to try.
        origin: The published figures that the speed is estimated from; empty if it is measured.

    >>> loses_time(0.89, ["larger images", "only_if_faster=True"]), loses_time(0.99, [])
    ('expected speed 0.89x of dense; try larger images or only_if_faster=True', '')
    """
    if speed >= SLOWER:
        return ""
    expected = f"expected speed {speed_text(speed)} of dense"
    if origin:
        expected += f" (estimated from {origin})"
    if not instead:
        return expected
    *others, last = instead
    options = f"{', '.join(others)} or {last}" if others else last
    return f"{expected}; try {options}"


def whole_model(speed: float) -> str:
    """The line about the expected speed of the whole model."""
    return f"whole model: expected speed {speed_text(speed)} of dense, by the sites below and MACs"


def not_faster(sites: int) -> str:
    """The line about that many sites whose best known speed is below that of dense attention."""
    saves = "1 site saves" if sites == 1 else f"{sites} sites save"
    return (
        f"{saves} MACs, not time: planning and kernel are not expected to beat dense attention "
        "(larger tile= or more tokens would change that, and only_if_faster=True leaves such sites "
        "dense)"
    )


def estimated_from(like: Tensor | None) -> str:
    """The published figures behind the prices of a parameter's GPU; empty if it was measured."""
    if like is None:
        return ""
    return cost.estimated_from(placement.device_of(like), like.dtype)


def price_source(like: Tensor | None, *, sparse: bool) -> str:
    """Where the prices of expected speeds come from, or why a tuning file is ignored.

    Args:
        like: A parameter of the model, if it has any.
        sparse: Whether any site has an expected speed.
    """
    fault = tuning_cache.fault()
    if fault is not None:
        return f"tuning file {fault}"
    if not sparse:
        return ""
    if like is not None and cost.is_tuned(placement.device_of(like), like.dtype):
        return "expected speeds come from measurements of `sparsiattn tune` on this machine"
    origin = estimated_from(like)
    if origin:
        return (
            f"expected speeds are estimates from {origin}, nothing was measured; run `sparsiattn "
            "tune` to measure this GPU"
        )
    return (
        "expected speeds come from measurements of other machines; "
        "run `sparsiattn tune` to measure this one"
    )
