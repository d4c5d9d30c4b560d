"""Sentences of a report about speed."""

from __future__ import annotations

from sparsiattn.patching.text import speed_text

# A whole model below this is expected to lose time; closer to 1.0 the estimate does not tell.
SLOWER = 0.98


def whole_model(speed: float) -> str:
    """What to say of the whole model's expected speed."""
    line = f"whole model: {speed_text(speed)} of dense expected, from the sites below and MACs"
    if speed >= SLOWER:
        return line
    return f"{line}; it would lose time: token_drop, only_if_faster=True or larger images would not"


def not_faster(sites: int) -> str:
    """What to say of that many sites whose best known speed is below that of dense attention."""
    saves = "1 site saves" if sites == 1 else f"{sites} sites save"
    return (
        f"{saves} MACs, not time: planning and kernel are not expected to beat dense attention "
        "(larger tile= or more tokens would change that, and only_if_faster=True leaves such sites "
        "dense)"
    )
