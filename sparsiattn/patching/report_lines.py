"""Sentences of a report about speed."""

from __future__ import annotations

from collections.abc import Sequence

from sparsiattn.patching.text import speed_text

# A whole model below this is expected to lose time; closer to 1.0 the estimate does not tell.
SLOWER = 0.98


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
    *others, last = instead
    options = f"{', '.join(others)} or {last}" if others else last
    return f"{speed_text(speed)} of dense expected; instead: {options}"


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
