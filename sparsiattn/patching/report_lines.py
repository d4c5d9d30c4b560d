"""Sentences of a report about speed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsiattn.kernels import cost, tuning_cache
from sparsiattn.patching.text import speed_text

# A whole model below this is expected to lose time; closer to 1.0 the estimate does not tell.
SLOWER = 0.98

# devices with kernels of this library; "meta" stands for any
SERVED = frozenset({"cpu", "cuda", "meta"})


def no_fast_kernel(device: str) -> str:
    """What to say of a model on a device for which there is no fast kernel; empty for others.

    Args:
        device: The type of the device.

    >>> no_fast_kernel("mps"), no_fast_kernel("cpu")
    ('no fast kernel for mps: sparse attention saves MACs there, not time', '')
    """
    if device in SERVED:
        return ""
    return f"no fast kernel for {device}: sparse attention saves MACs there, not time"


def loses_time(speed: float, instead: Sequence[str]) -> str:
    """What to say of a model that is expected to lose time; empty for one that is not.

    Args:
        speed: Expected, relative to dense.
        instead: What to type instead.

    >>> loses_time(0.89, ["larger images", "only_if_faster=True"]), loses_time(0.99, [])
    ('0.89x of dense expected; instead: larger images or only_if_faster=True', '')
    """
    if speed >= SLOWER:
        return ""
    expected = f"{speed_text(speed)} of dense expected"
    if not instead:
        return expected
    *others, last = instead
    options = f"{', '.join(others)} or {last}" if others else last
    return f"{expected}; instead: {options}"


def whole_model(speed: float) -> str:
    """What to say of the whole model's expected speed."""
    return f"whole model: {speed_text(speed)} of dense expected, from the sites below and MACs"


def not_faster(sites: int) -> str:
    """What to say of that many sites whose best known speed is below that of dense attention."""
    saves = "1 site saves" if sites == 1 else f"{sites} sites save"
    return (
        f"{saves} MACs, not time: planning and kernel are not expected to beat dense attention "
        "(larger tile= or more tokens would change that, and only_if_faster=True leaves such sites "
        "dense)"
    )


def price_source(like: Tensor | None, *, sparse: bool) -> str:
    """By whose prices the speeds of sparse sites are expected, or why a tuning file is ignored.

    Args:
        like: A parameter of the model, if it has any.
        sparse: Whether there is a site that is not simply dense.
    """
    fault = tuning_cache.fault()
    if fault is not None:
        return f"tuning file {fault}"
    if not sparse:
        return ""
    if like is not None and cost.is_tuned(like.device, like.dtype):
        return "expected speeds: by what `sparsiattn tune` measured on this machine"
    return (
        "expected speeds: by shipped figures of other machines; `sparsiattn tune` measures this one"
    )
