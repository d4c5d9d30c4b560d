"""Cases that hypothesis draws, the same ones in every run of one seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from reliability import answers, operands, refused, roundtrips
from reliability.drawn import cases
from reliability.outcomes import Tally

SEED = 20_261_123


def drawn(
    strategy: st.SearchStrategy[Any], count: int, one: Callable[[Any], None], part: int = 0
) -> None:
    """Call ``one`` with ``count`` drawn cases. Nothing is shrunk: wrong ones are counted.
    part: of several runs, each with a seed of its own."""

    @seed(SEED + part)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(case: Any) -> None:
        one(case)

    run()


def models(count: int, part: int = 0) -> Tally:
    """Patched models on drawn inputs."""
    tally = Tally()
    drawn(cases(), count, lambda case: answers.run(case, tally), part)
    return tally


def _judged(
    strategy: st.SearchStrategy[Any], judge: Any, about: Any, count: int, part: int = 0
) -> Tally:
    tally = Tally()
    drawn(
        strategy, count,
        lambda case: tally.run(lambda one: judge(one, tally), case, *about(case)), part,
    )  # fmt: skip
    return tally


def kernels(count: int, part: int = 0) -> Tally:
    """Kernels alone on drawn calls and patterns."""
    return _judged(
        operands.calls(), operands.judge, lambda c: (c.kernel, c.dtype, c.layout), count, part
    )  # fmt: skip


def misuse(count: int) -> Tally:
    """Options out of range and of wrong types."""
    return _judged(refused.misuses(), refused.judge, lambda c: (c.strategy,), count)


def saved(count: int) -> Tally:
    """Round trips through files."""
    return _judged(roundtrips.trips(), roundtrips.judge, lambda c: (c.strategy, c.damage), count)
