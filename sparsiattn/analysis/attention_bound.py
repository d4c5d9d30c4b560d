"""How much faster a model could be if its attention took no time: what fewer keys cannot exceed."""

from __future__ import annotations


def bound_of(share: float) -> float:
    """The bound, where all but attention takes its share of the MACs.

    Args:
        share: MACs of QK^T and AV over all.

    >>> bound_of(0.5), round(bound_of(1.0))
    (2.0, 100)
    """
    return 1.0 / (1.0 - min(share, 0.99))


def bound_text(share: float) -> str:
    """The bound in words.

    >>> bound_text(0.2)
    'attention is 20 % of the MACs, so fewer keys alone give less than about 1.25x'
    """
    return (
        f"attention is {100 * share:.0f} % of the MACs, so fewer keys alone give less than about "
        f"{bound_of(share):.2f}x"
    )
