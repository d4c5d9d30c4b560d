"""Options that nobody should pass: each is refused in words, or means something and works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import sparsiattn
from reliability.answers import untouched
from reliability.drawn import names
from reliability.hosts import Host, build
from reliability.outcomes import Tally, Wrong
from sparsiattn.registry import REGISTRY

ODD: tuple[Any, ...] = (
    0, -1, 1.0000001, -0.1, 0.0, float("nan"), float("inf"), -float("inf"), True, False, None,
    "half", "", b"1", 10**30, 1e-300, [], [0.5], [0.5, 0.5], [0.5] * 3, (0, 0), (2, -1), (1.5, 2),
    {}, {"a": 1}, lambda site: 0.5, lambda site: 2.5, lambda site: "x", torch.tensor(0.5),
    torch.nan, 2**63, complex(1, 1), range(2), {1, 2}, "adaptive", "auto",
    [10], [-1], ["0"], [1, 0],
)  # fmt: skip


@dataclass(frozen=True)
class Misuse:
    """A strategy, one option and a number into `ODD`, and what beside it."""

    strategy: str
    option: str
    odd: int
    kernel: str
    depth: int


@st.composite
def misuses(draw: Any) -> Misuse:
    name = draw(st.sampled_from(names()))
    kind = REGISTRY.get("strategies", name)
    other = ["no_such_option", "k", "sites", "kernel", "only_if_faster", "schedule", "input"]
    option = draw(st.sampled_from([*kind.option_names(), *kind.option_names(), *other]))
    kernel = draw(st.sampled_from([*["auto"] * 6, "gather", "nothing"]))
    odd = draw(st.integers(0, len(ODD) - 1))
    return Misuse(name, option, odd, kernel, draw(st.integers(1, 2)))


def judge(case: Misuse, tally: Tally) -> str:
    """The outcome of one wrong call; raises where it is wrong."""
    model = build(Host(grid=(3, 3), depth=case.depth))
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(x)
        options: dict[str, Any] = {"kernel": case.kernel, case.option: ODD[case.odd]}
        try:
            live = sparsiattn.patch(model, case.strategy, **options)
        except Exception as error:
            outcome = tally.documented(error)
        else:
            with live:
                out = model(x)
            if out.shape != dense.shape or not bool(out.isfinite().all()):
                raise Wrong(f"{case.option}={ODD[case.odd]!r} was taken and gives {out}")
            outcome = "taken, and a finite answer of the right shape"
        if not torch.equal(model(x), dense):
            raise Wrong("the model is not what it was")
    return untouched(model, outcome)
