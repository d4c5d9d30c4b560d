"""The lines that a study compares on each model, own ones beside what people do instead."""

from __future__ import annotations

from typing import Any

import sparsiattn
from quality.variants import Line

# what is measured where nobody names lines
FEW: list[Line] = [
    *({"strategy": "connectivity", "k": k} for k in (0.1, 0.25, 0.5)),
    *({"strategy": "topk", "k": k} for k in (0.1, 0.25)),
]
SHARES = (0.05, 0.1, 0.25, 0.5, 0.9)
KEEPS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
RATIOS = (0.8, 0.85, 0.9, 0.925, 0.975)
SIZES = (0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375)


def lines(depth: int) -> list[Line]:
    """Every line of a study, for a model of so many blocks."""
    return [*attention(), *tokens(), *hybrids(), *others(), *instead(depth), *together()]


def attention() -> list[Line]:
    """Fewer keys."""
    connectivity = [{"strategy": "connectivity", "k": k} for k in SHARES]
    tiles: list[Line] = [
        {"strategy": "connectivity", "k": k, "tile": tile}
        for k in (0.1, 0.25)
        for tile in (1, (4, 4), (8, 4))
    ]
    plain = [{"strategy": "connectivity", "k": k, "background": None} for k in (0.1, 0.25, 0.5)]
    top: list[Line] = [{"strategy": "topk", "k": k} for k in (0.1, 0.25, 0.5)]
    pooled = [{"strategy": "topk", "k": k, "background": "auto"} for k in (0.1, 0.25)]
    blind: list[Line] = [
        {"strategy": "local", "k": 0.1},
        {"strategy": "local", "k": 0.25},
        {"strategy": "random", "k": 0.25},
    ]
    return [*connectivity, *tiles, *plain, *top, *pooled, *blind]


def tokens() -> list[Line]:
    """Fewer tokens."""
    dropped: list[Line] = [{"strategy": "token_drop", "keep": keep} for keep in KEEPS]
    fused = [{"strategy": "token_drop", "keep": keep, "fuse": True} for keep in (0.5, 0.7, 0.9)]
    blind = [{"strategy": "token_drop", "keep": keep, "score": "random"} for keep in (0.5, 0.7)]
    merged: list[Line] = [{"strategy": "token_merge", "ratio": ratio} for ratio in RATIOS]
    merged.append({"strategy": "token_merge"})
    pitome = [{"strategy": "token_merge", "ratio": r, "method": "pitome"} for r in (0.9, 0.95)]
    return [*dropped, *fused, *blind, *merged, *pitome]


def hybrids() -> list[Line]:
    """Both."""
    shares = ((0.25, 0.7), (0.1, 0.7), (0.1, 0.5), (0.25, 0.9))
    dropped: list[Line] = [{"strategy": "hybrid", "k": k, "keep": keep} for k, keep in shares]
    merged = [{"strategy": "hybrid", "k": k, "tokens": "token_merge"} for k in (0.1, 0.25)]
    return [*dropped, *merged]


def others() -> list[Line]:
    """Every other strategy that is installed, as typed without any option."""
    done = {"dense", "connectivity", "topk", "local", "random", "token_drop", "token_merge"}
    return [
        {"strategy": name} for name in sparsiattn.list_strategies() if name not in done | {"hybrid"}
    ]


def instead(depth: int) -> list[Line]:
    """What people do without this library."""
    smaller: list[Line] = [{"resolution": share} for share in SIZES]
    shallower: list[Line] = [{"layers": depth - less} for less in (1, 2, 3)]
    return [*smaller, *shallower, {"dtype": "bfloat16"}, {"quantize": "int8"}]


def together() -> list[Line]:
    """That and ours."""
    own: list[dict[str, Any]] = [
        {"strategy": "connectivity", "k": 0.25},
        {"strategy": "token_merge"},
    ]
    return [
        {**line, **other}
        for line in own
        for other in ({"dtype": "bfloat16"}, {"resolution": 0.875})
    ]
