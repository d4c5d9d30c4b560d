"""MACs of token strategies: closed forms, to the unit, and the published figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

import sparsiattn
from sparsiattn.strategies import Connectivity
from tests.support import zoo
from tests.support.token_macs import WIDTH, check, deit, tokens

# the small one by default: it is the one with published figures
SIZES = [pytest.param(s, marks=[] if s == "small" else [pytest.mark.slow]) for s in WIDTH]


def evit(keep: float, fuse: bool) -> Any:
    return lambda i, n: math.ceil(keep * n) + fuse if i in (3, 6, 9) else n


@pytest.mark.parametrize(
    ("size", "giga"), zoo.slow_but([("tiny", 1.254), ("small", 4.599)], ("base", 17.564))
)
def test_dense(size: str, giga: float) -> None:
    with sparsiattn.patch(deit(size), "token_drop", keep=1.0) as live:
        report = live.report()
    assert check(size, tokens(lambda i, n: n), report) == report.macs_dense
    assert report.macs_dense / 1e9 == pytest.approx(giga, abs=6e-4)


@pytest.mark.parametrize(
    ("keep", "mhsa", "giga"),
    [(0.9, None, 3.99), (0.8, None, 3.44), (0.7, 193.18, 3.00), (0.5, 148.60, 2.28)],
)
def test_evit_on_deit_s(keep: float, mhsa: float | None, giga: float) -> None:
    with sparsiattn.patch(deit("small"), "token_drop", keep=keep) as live:
        report = live.report()
    macs = check("small", tokens(evit(keep, False)), report)
    assert report.mhsa_macs is not None
    assert mhsa is None or round(report.mhsa_macs / 1e6, 2) == mhsa
    assert macs / 1e9 == pytest.approx(giga, abs=0.0051)
    assert 0 <= report.predictor_macs < 0.01 * macs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [0.7, 0.5])
def test_evit_with_fused_token(size: str, keep: float) -> None:
    with sparsiattn.patch(deit(size), "token_drop", keep=keep, fuse=True) as live:
        check(size, tokens(evit(keep, True)), live.report())


@pytest.mark.parametrize(
    ("r", "giga", "final"),
    zoo.slow_but([(8, 3.42, 101), (16, 2.29, 11)], (5, 3.85, 137), (10, 3.13, 77), (13, 2.70, 41)),
)
@pytest.mark.parametrize("size", SIZES)
def test_tome(size: str, r: int, giga: float, final: int) -> None:
    counts = tokens(lambda i, n: n - min(r, n // 2))
    with sparsiattn.patch(deit(size), "token_merge", r=r) as live:
        macs = check(size, counts, live.report())
    assert counts[1][-1] == final
    assert size != "small" or macs / 1e9 == pytest.approx(giga, abs=0.0051)


PITOME = {0.9: (2.60, 9.97, 60), 0.9125: (2.76, 10.62, 69), 0.925: (2.99, 11.49, 82),
          0.95: (3.44, 13.19, 111), 0.975: (4.01, 15.34, 151)}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", zoo.slow_but([0.9, 0.975], 0.9125, 0.925, 0.95))
def test_pitome(size: str, ratio: float) -> None:
    small, base, final = PITOME[ratio]
    counts = tokens(lambda i, n: n - math.floor(n - n * ratio))
    with sparsiattn.patch(deit(size), "token_merge", method="pitome", ratio=ratio) as live:
        report = live.report()
    assert counts[1][-1] == final
    macs = check(size, counts, report)
    published = {"small": small, "base": base}.get(size)
    # 2.595 at ratio 0.9 where the table, itself derived, says 2.60
    assert published is None or macs / 1e9 == pytest.approx(published, abs=0.0055)


def test_sparsifiner_evit_counts_kept_pairs() -> None:
    """Hybrid at exactly k of the keys that are left, without summary keys."""
    options: dict[str, Any] = {"k": 0.25, "keep": 0.7, "background": None, "tile": 1}
    with sparsiattn.patch(deit("small"), "hybrid", only_if_faster=False, **options) as live:
        report = live.report()
    entering, _ = tokens(evit(0.7, False))
    assert [site.tokens for site in report.sites] == entering
    expected = sum(2 * 384 * (n + (n - 1) * math.ceil(0.25 * n)) for n in entering)
    assert report.mhsa_macs == expected


@pytest.mark.parametrize(
    ("keep", "pairs", "predictor"), [(0.7, 49_958_400, 88_230_144), (0.5, 38_475_264, 68_517_888)]
)
def test_sparsifiner_evit_as_in_the_docs(keep: float, pairs: int, predictor: int) -> None:
    """The paper prints 113.3 M and 86.6 M for the two together; no constant is fitted to them."""
    paper = Connectivity(
        k=0.25, background=None, mean_query_boost=False, self_weight=None, basis=32
    )
    options: dict[str, Any] = {"attention": paper, "keep": keep, "only_if_faster": False}
    with sparsiattn.patch(deit("small"), "hybrid", **options) as live:
        report = live.report()
    assert (report.mhsa_macs, report.predictor_macs) == (pairs, predictor)


def test_adaptive_counts_are_unknown_until_images_come() -> None:
    with sparsiattn.patch(deit("tiny"), "token_drop", keep="adaptive") as live:
        report = live.report()
    assert report.macs is None
    assert "adapt" in str(report)
