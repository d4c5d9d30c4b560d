"""What hypothesis draws: patches, inputs, and the frozen cases that they make up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

import sparsiattn
from reliability.hosts import DTYPES, Host
from sparsiattn.registry import REGISTRY

LAYOUTS = ("contiguous", "channels_last", "strided", "flipped", "expanded")
SPECIALS = (
    *["none"] * 12, "nan pixel", "nan image", "large", "zeros", "constant", "large",
    "nan pixel", "inf pixel", "nan image", "-inf image", "wrong channels", "wrong size",
    "wrong dtype", "wrong rank",
)  # fmt: skip
KERNELS = ("auto", "reference", "sdpa", "gather", "native")
SITES: tuple[Any, ...] = (*["*"] * 16, "*.0.*", ["*.attn"], "*.1.*", "none.such", ["*", "x"], 3)


@dataclass(frozen=True)
class Given:
    """One input: how many images, how they lie in memory, what is odd about them, and whether
    features are asked for instead of logits."""

    batch: int
    layout: str
    special: str
    features: bool
    seed: int


@dataclass(frozen=True)
class Case:
    """One patch of one host, and inputs."""

    host: Host
    dtype: str
    strategy: str
    options: tuple[tuple[str, Any], ...]
    kernel: str
    sites: Any
    inputs: tuple[Given, ...]


def shares() -> st.SearchStrategy[Any]:
    """Budgets that are allowed: shares, counts, counts beyond all tokens, and all."""
    return st.one_of(
        st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0, 1.0]),
        st.floats(0.01, 1.0),
        st.integers(1, 20),
    )


def _layers() -> st.SearchStrategy[Any]:
    return st.sampled_from([None, [0], [0], None, [0, 1], [1]])


def _counts(low: int, high: int) -> st.SearchStrategy[Any]:
    return st.integers(low, high)


SMALL = st.one_of(st.none(), _counts(1, 4))
TILES = st.sampled_from([1, "auto", (1, 1), (2, 2), (1, 3), (2, 1), (4, 4), (8, 8)])
BOOLS = st.booleans()

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "k": shares(),
    "keep": shares(),
    "tile": TILES,
    "block": TILES,
    "background": SMALL,
    "prefix_keys": BOOLS,
    "layers": _layers(),
    "restore": st.sampled_from(["auto", "unfold", "scatter", None]),
    "seed": _counts(0, 3),
}
"""Options of the same meaning everywhere."""

OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "connectivity": {
        "tokens_per_basis": st.sampled_from([None, 0.25, 0.5, 1.0]), "basis": SMALL,
        "basis_threshold": st.sampled_from([0.0, 0.02, 0.5]), "basis_coef_topk": SMALL,
        "head_scale": BOOLS, "mean_query_boost": BOOLS,
        "self_weight": st.sampled_from([None, 0.1, 1.0]),
    },
    "token_drop": {
        "keep": st.one_of(shares(), st.just("adaptive")), "fuse": BOOLS,
        "score": st.sampled_from(["cls", "mean_query", "learned", "norm", "random"]),
        "mass": st.sampled_from([None, None, 0.5, 0.9, 1.0]),
        "threshold": st.sampled_from([None, None, 0.5, 2.0]),
    },
    "token_merge": {
        "r": st.one_of(_counts(0, 8), st.tuples(_counts(0, 4), st.sampled_from([-1.0, 0.5, 1.0]))),
        "ratio": st.one_of(st.none(), st.none(), st.floats(0.3, 1.0)), "proportional": BOOLS,
        "method": st.sampled_from(["tome", "pitome"]),
    },
    "hybrid": {
        "attention": st.sampled_from(["connectivity", "topk", "random", "local", "bilevel"]),
        "tokens": st.sampled_from(["token_drop", "token_merge", "ats", "dpc_knn"]),
    },
    "linformer": {"shared": BOOLS, "mass": BOOLS},
    "lowrank": {"rank": shares(), "guide": st.sampled_from([None, 4, 16])},
    "hypergraph": {"members": _counts(1, 20)},
    "attention_reuse": {"layers": st.sampled_from([None, (1,)]),
                        "rank": st.sampled_from([None, 2])},
    "skipat": {"layers": st.sampled_from([None, (1,)]), "parametric": BOOLS},
    "bilevel": {"regions": st.one_of(_counts(1, 7), st.just((2, 3))), "shared": BOOLS},
    "binary_topk": {"center": BOOLS},
    "sd_filter": {"width": _counts(1, 16), "shared": BOOLS},
    "fibottention": {"w_min": _counts(1, 6), "modified": BOOLS, "shuffle": BOOLS},
    "longformer": {"window": st.sampled_from([1, 3, 7]), "dilation": _counts(1, 3),
                   "global_patches": _counts(0, 3)},
    "bigbird": {"window": st.sampled_from([1, 3, 5]), "random": _counts(0, 4),
                "global_patches": _counts(0, 3)},
    "atrous": {"window": st.sampled_from([1, 3, 7]), "fuse": BOOLS,
               "dilations": st.sampled_from([(1,), (1, 2), (2, 3)])},
    "avggt": {"first": st.sampled_from([0, 0.5, 1]), "stride": _counts(1, 5)},
    "atc": {"linkage": st.sampled_from(["average", "single", "complete"]), "proportional": BOOLS},
    "ailurus": {"k": _counts(1, 6), "alpha": st.floats(0.0, 1.0), "proportional": BOOLS,
                "neighbours": st.sampled_from([0.25, 3])},
    "expedit": {"cells": st.sampled_from([None, (2, 2), (1, 3)]), "iterations": _counts(1, 3),
                "neighbours": _counts(1, 20), "temperature": st.sampled_from([0.01, 1.0])},
    "kmedoids": {"iterations": _counts(1, 4)},
    "dpc_knn": {"k": _counts(1, 20), "proportional": BOOLS},
    "ats": {"static": BOOLS},
    "sit": {"hidden": st.sampled_from([0.25, 0.5, 2.0])},
    "sinkhorn": {"epsilon": st.sampled_from([0.05, 1.0]), "iterations": _counts(1, 4)},
}  # fmt: skip
"""What only one strategy has, and what it understands otherwise than the others."""


def names() -> list[str]:
    """Every strategy that the library brings along."""
    infos = sparsiattn.list_strategies().items()
    return [n for n, info in infos if info.plugin.startswith("sparsiattn.")]


@st.composite
def options(draw: Any, name: str) -> tuple[tuple[str, Any], ...]:
    """Some options of a strategy; those that are left out have their defaults."""
    known = REGISTRY.get("strategies", name).option_names()
    rows = {**{n: s for n, s in OPTIONS.items() if n in known}, **OWN.get(name, {})}
    usual = [n for n in rows if n in ("k", "keep", "r", "rank", "layers")]
    rare = [n for n in rows if n not in usual]
    chosen = [*usual, *draw(st.lists(st.sampled_from(rare), max_size=3, unique=True))]
    return tuple((n, draw(rows[n])) for n in sorted(chosen))


def hosts() -> st.SearchStrategy[Host]:
    side = st.integers(1, 4)
    plain = st.builds(
        Host, family=st.sampled_from(["vit", "vit", "vit", "unfused"]),
        grid=st.one_of(st.just((4, 4)), st.tuples(side, side)), depth=st.integers(1, 2),
        heads=st.integers(1, 3), width=st.sampled_from([8, 16]),
        prefix=st.sampled_from([0, 1, 1, 3]),
    )  # fmt: skip
    windowed = st.builds(Host, family=st.just("swin"), depth=st.integers(1, 2))
    return st.one_of(plain, plain, plain, windowed)


def givens() -> st.SearchStrategy[Given]:
    return st.builds(
        Given, batch=st.sampled_from([2, 1, 3, 2, 0]), layout=st.sampled_from(LAYOUTS),
        special=st.sampled_from(SPECIALS), features=st.sampled_from([False, False, True]),
        seed=st.integers(0, 999),
    )  # fmt: skip


@st.composite
def cases(draw: Any, inputs: int = 4) -> Case:
    name = draw(st.sampled_from(names()))
    return Case(
        draw(hosts()), draw(st.sampled_from(["fp32", "fp32", *DTYPES])), name, draw(options(name)),
        draw(st.sampled_from(KERNELS)), draw(st.sampled_from(SITES)),
        tuple(draw(st.lists(givens(), min_size=inputs, max_size=inputs))),
    )  # fmt: skip
