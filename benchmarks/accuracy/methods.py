"""What is compared: every method at every budget, as rows of one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sparsiattn
from sparsiattn.registry import REGISTRY

BUDGETS = (0.5, 0.25, 0.1, 0.05)
KEEPS = (0.9, 0.7, 0.5)
LAYERS = [2, 4]  # a third and two thirds of six blocks
SEEDS = (0, 1, 2)
TILES: tuple[Any, ...] = (1, (2, 2))
BACKGROUNDS = (None, 1, 2, 4)
FINE = (0.25, 0.1)
LABELS = {"tokens_per_basis": "reduce", "self_weight": "own"}  # as the committed table has them


@dataclass(frozen=True)
class Method:
    """One row: a strategy with its options, and what was fitted before it was measured.

    fit: ``"none"``, ``"calibrated"`` (planners alone, no labels) or ``"trained"`` (two stages).
    """

    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    fit: str = "none"
    seed: int | None = None

    @property
    def name(self) -> str:
        options = {LABELS.get(name, name): value for name, value in self.options.items()}
        said = [f"{name}={text(value)}" for name, value in options.items() if name != "layers"]
        fit = [] if self.fit == "none" else [self.fit]
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        return " ".join([self.strategy, *fit, *said, *seed])


def text(value: Any) -> str:
    """A value as names have it."""
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def methods() -> Iterator[Method]:
    """From what costs seconds to what costs hours."""
    yield Method("dense")
    yield from _plain()
    yield from _tokens()
    yield from _published()
    for tile in TILES:
        for background in BACKGROUNDS:
            for k in BUDGETS:
                yield Method("connectivity", _connect(k, tile, background))
    for k in BUDGETS:
        yield Method("connectivity", {**_connect(k, 1, 2), "self_weight": None})
    for fit, seed in (("none", None), ("calibrated", 0)):
        for background in (2, 4):
            for k in FINE:
                finer = {**_connect(k, 1, background), "tokens_per_basis": 2}
                yield Method("connectivity", finer, fit, seed)
    for seed in SEEDS:
        for tile in TILES:
            for background in BACKGROUNDS if seed == 0 else (2,):
                for k in BUDGETS if seed == 0 else FINE:
                    yield Method("connectivity", _connect(k, tile, background), "calibrated", seed)
    yield from _trained()


def _plain() -> Iterator[Method]:
    for strategy in ("random", "local", "topk"):
        for background in (None, 2):
            for k in BUDGETS:
                yield Method(strategy, {"k": k, "background": background})


def _tokens() -> Iterator[Method]:
    for keep in KEEPS:
        yield Method("token_drop", {"keep": keep, "layers": LAYERS})
        yield Method("token_drop", {"keep": keep, "layers": LAYERS, "fuse": True})
        yield Method("token_merge", {"ratio": keep})
        yield Method("hybrid", _hybrid(keep, 0.25))
        yield Method("hybrid", _hybrid(keep, 0.1))


def _published() -> Iterator[Method]:
    """The methods of other papers at one budget, by their own defaults in all else; planners that
    learn calibrated too."""
    budgets: dict[str, dict[str, Any]]
    budgets = {"attention": {"k": 0.25}, "tokens": {"keep": 0.7, "layers": LAYERS}}
    for name, info in sparsiattn.list_strategies().items():
        if info.plugin != "sparsiattn.methods":
            continue
        takes = REGISTRY.get("strategies", name).option_names()
        options = {option: value for option, value in budgets[info.kind].items() if option in takes}
        if name == "expedit":  # clusters a whole grid, so only once
            options["layers"] = LAYERS[:1]
        yield Method(name, options)
        if info.needs_training and info.kind == "attention":
            yield Method(name, options, "calibrated", 0)


def _trained() -> Iterator[Method]:
    for seed in SEEDS:
        yield Method("dense", {}, "trained", seed)
        for tile, background in ((1, 2), ((2, 2), 2), (1, 4)):
            yield Method("connectivity", _connect(0.1, tile, background), "trained", seed)
        yield Method(
            "connectivity", {**_connect(0.1, 1, 4), "tokens_per_basis": 2}, "trained", seed
        )
        yield Method("token_drop", {"keep": 0.7, "layers": LAYERS}, "trained", seed)
        yield Method("hybrid", _hybrid(0.7, 0.25), "trained", seed)
    for seed in SEEDS:
        yield Method("connectivity", _connect(0.25, 1, 2), "trained", seed)


def _connect(k: float, tile: Any, background: int | None) -> dict[str, Any]:
    return {"k": k, "tile": tile, "background": background}


def _hybrid(keep: float, k: float) -> dict[str, Any]:
    return {"k": k, "keep": keep, "layers": LAYERS, "only_if_faster": False}
