"""What there is to try: families of settings with one number each, by which speed is monotone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from sparsiattn.analysis.attention_bound import bound_of
from sparsiattn.patching.discovery.meta_model import meta_copy, value_copy
from sparsiattn.patching.report import dense_macs
from sparsiattn.patching.survey import ModelSurvey

Settings = Mapping[str, Any]

TILED = 1024
"""Tokens from which ``tile="auto"`` lets queries share their keys."""


def line_of(settings: Settings) -> str:
    """The call of `patch` that applies settings to a variable ``model``.

    >>> line_of({"strategy": "connectivity", "k": 0.1})
    "sparsiattn.patch(model, 'connectivity', k=0.1)"
    """
    options = {name: value for name, value in settings.items() if name != "strategy"}
    text = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"sparsiattn.patch(model, {settings['strategy']!r}{text})"


@dataclass(frozen=True)
class Family:
    """Settings that differ in one number, which says how much stays.

    Attributes:
        name: For progress.
        build: From the number to the keyword arguments of `patch`.
        time: From the number to the time expected, as a share of the dense model's; it rises.
        low: The least number worth trying.
        high: The largest.
        step: Numbers are multiples of it.
        parent: The family of which this is a variant, tried where that one does well.
    """

    name: str
    build: Callable[[float], dict[str, Any]]
    time: Callable[[float], float]
    low: float
    high: float
    step: float
    parent: str = ""

    def rounded(self, x: float) -> float:
        """The multiple of the step at or below a number, within the limits."""
        steps = int(x / self.step + 1e-9)
        return round(min(self.high, max(self.low, steps * self.step)), 4)

    def solve(self, share: float) -> float:
        """The number at which so large a share of the dense time is expected."""
        low, high = self.low, self.high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.time(middle) < share else (low, middle)
        return self.rounded(high)


@dataclass(frozen=True)
class Shape:
    """What the short list depends on.

    Attributes:
        attention: Share of the MACs that QK^T and AV have.
        tokens: Queries of the largest site.
        depth: Sites, which are nearly always as many as blocks.
        windowed: Whether attention has windows.
        views: Most views that a site attends to at once.
    """

    attention: float
    tokens: int
    depth: int
    windowed: bool = False
    views: int = 1

    @classmethod
    def of(cls, surveyed: ModelSurvey, macs: int) -> Shape:
        """That of a model, which has so many MACs."""
        sites = [site for site, _ in surveyed.sites]
        share = sum(site.macs for site in sites) / max(1, macs)
        tokens, windowed = max(s.tokens for s in sites), any(s.windows > 1 for s in sites)
        views = max(s.views for s in sites)
        return cls(min(share, 0.99), tokens, len(sites), windowed, views)

    @property
    def bound(self) -> float:
        """How much faster the model could be if attention took no time and all else did."""
        return bound_of(self.attention)


def shape_of(surveyed: ModelSurvey, model: nn.Module) -> Shape:
    """The `Shape` of a model, whose MACs are counted where the survey has not."""
    macs = surveyed.macs
    if macs is None:
        copied = value_copy if surveyed.example.with_values else meta_copy
        macs = dense_macs(copied(model), surveyed.inputs())
    return Shape.of(surveyed, macs)


def families(shape: Shape) -> Iterator[Family]:
    """The short list for a model, in the order in which they are tried."""
    half = list(range(max(1, shape.depth // 2)))
    early = partial(_merged, shape, len(half))
    everywhere = partial(_merged, shape, shape.depth)
    if shape.windowed:
        yield Family("window skip", _windows, lambda x: 0.9 + 0.1 * x, 0.2, 0.9, 0.05)
    if shape.views > 1:
        yield Family("early layers within each view", _within_views, partial(_two_steps, shape),
                     0.0, 1.0, 0.125)  # fmt: skip
    yield Family("token_merge", _option("token_merge", "ratio"), everywhere, 0.6, 0.985, 0.005)
    yield _attention("connectivity", shape, {})
    yield Family(
        "token_merge in the first half",
        lambda x: {"strategy": "token_merge", "ratio": x, "layers": half},
        early, 0.5, 0.985, 0.005,
    )  # fmt: skip
    yield Family(
        "token_drop",
        lambda x: {"strategy": "token_drop", "keep": x, "fuse": True},
        partial(_dropped, shape), 0.3, 0.95, 0.01,
    )  # fmt: skip
    yield Family(
        "hybrid of merged tokens and connectivity", _merging_hybrid,
        lambda x: max(0.05, everywhere(x) - 0.3 * shape.attention), 0.6, 0.985, 0.005,
        parent="token_merge",
    )  # fmt: skip
    yield Family(
        "hybrid", lambda x: {"strategy": "hybrid", "k": 0.25, "keep": x},
        lambda x: max(0.05, _dropped(shape, x) - 0.3 * shape.attention), 0.3, 0.95, 0.01,
    )  # fmt: skip
    if shape.tokens >= TILED:
        yield _attention("connectivity with small tiles", shape, {"tile": (4, 4)})
        yield _attention("connectivity with tile=1", shape, {"tile": 1})
    yield _attention("connectivity where faster", shape, {"only_if_faster": True})


def _option(strategy: str, name: str) -> Callable[[float], dict[str, Any]]:
    return lambda x: {"strategy": strategy, name: x}


def _attention(name: str, shape: Shape, options: dict[str, Any]) -> Family:
    return Family(
        name,
        lambda x: {"strategy": "connectivity", "k": x, **options},
        lambda x: 1.0 - shape.attention * (1.0 - min(1.0, 0.4 + 0.8 * x)),
        0.03, 0.6, 0.01,
        parent="connectivity" if options else "",
    )  # fmt: skip


def _windows(x: float) -> dict[str, Any]:
    return {"strategy": "token_drop", "keep": x, "skip": "window", "score": "norm"}


def _within_views(x: float) -> dict[str, Any]:
    return {"strategy": "avggt", "first": round(1 - x, 3), "stride": 2}


def _two_steps(shape: Shape, across: float) -> float:
    """Time if such a share of the layers over several views attends to every fourth patch of each
    view, and the others to one view."""
    return 1.0 - shape.attention * (1.0 - across * 0.3 - (1.0 - across) / shape.views)


def _merging_hybrid(x: float) -> dict[str, Any]:
    # in JSON form, so that the line needs no import; merged tokens have no grid for tiles
    tokens = {"name": "token_merge", "version": 1, "options": {"ratio": x}}
    return {"strategy": "hybrid", "k": 0.25, "tile": 1, "tokens": tokens}


def _block(shape: Shape, before: float, after: float) -> float:
    """Time of a block with such shares of its tokens before and after its attention."""
    linear = (1.0 - shape.attention) * (before + 2.0 * after) / 3.0
    return shape.attention * before**2 + linear


def _merged(shape: Shape, layers: int, ratio: float) -> float:
    shares = [ratio ** min(i, layers) for i in range(shape.depth + 1)]
    return sum(_block(shape, *pair) for pair in pairwise(shares)) / shape.depth


def _dropped(shape: Shape, keep: float) -> float:
    depth = shape.depth
    layers = {depth // 4, depth // 2, 3 * depth // 4}
    shares = [keep ** sum(layer < i for layer in layers) for i in range(depth + 1)]
    return sum(_block(shape, *pair) for pair in pairwise(shares)) / depth
