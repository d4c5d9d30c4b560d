"""Hosts of 2025 and 2026, and every task head: each is patched by the laws, or refused by name.

What is known of every cell is kept in ``benchmarks/results/recent.json``, which ``python
benchmarks/support.py --recent`` writes; here the cells run again.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest

import sparsiattn
from tests.support import ROOT, census_recent, hosts_recent, matrix
from tests.support.census_recent import COLUMNS, Host

STORED = ROOT / "benchmarks" / "results" / "recent.json"
KNOWN: dict[str, dict[str, dict[str, str]]] = json.loads(STORED.read_text())
pytestmark = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not here")


@cache
def hosts(kind: str) -> dict[str, Host]:
    return hosts_recent.HOSTS if kind == "hosts" else dict(census_recent.heads())


@cache
def subject(kind: str, name: str) -> matrix.Subject:
    try:
        return census_recent.subject(name, hosts(kind)[name])
    except (AttributeError, ImportError, KeyError) as error:
        if _current():
            raise
        pytest.skip(f"this version of transformers lacks it: {error}")


def _current() -> bool:
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24)


def _cells(kind: str) -> list[Any]:
    """All cells; by default only some are run, and those known to fail must go on to be mended."""
    rows = []
    for name, row in KNOWN[kind].items():
        for column in COLUMNS:
            quick = (kind == "hosts" and column == "connectivity") or (
                "Backbone" in name and column == "token_drop"
            )
            marks: list[Any] = [] if quick else [pytest.mark.census]
            if row[column].startswith("fails"):
                marks.append(pytest.mark.xfail(strict=True, reason=row[column]))
            rows.append(pytest.param(kind, name, column, id=f"{name}-{column}", marks=marks))
    return rows


@pytest.mark.parametrize(("kind", "name", "column"), [*_cells("hosts"), *_cells("heads")])
def test_cell(kind: str, name: str, column: str) -> None:
    now = census_recent.outcome(subject(kind, name), column)
    assert not now.startswith("fails"), now
    assert now.split(":")[0] == KNOWN[kind][name][column].split(":")[0], now


@pytest.mark.parametrize("kind", ["hosts", "heads"])
def test_every_host_has_a_row(kind: str) -> None:
    if _current():
        assert set(KNOWN[kind]) == set(hosts(kind))


@pytest.mark.parametrize("kind", ["hosts", "heads"])
def test_no_cell_fails(kind: str) -> None:
    cells = {(n, c): text for n, row in KNOWN[kind].items() for c, text in row.items()}
    assert [cell for cell, text in cells.items() if text.startswith("fails")] == []


def test_most_hosts_of_today_are_patched() -> None:
    connectivity, tokens = census_recent.shares(KNOWN["hosts"])
    assert connectivity >= 0.9
    assert tokens >= 0.75  # packed sequences and views side by side are refused by name


def test_views_are_kept_apart_or_refused() -> None:
    """Layers across views see ``views x (camera token + patches)``."""
    host = hosts_recent.HOSTS["depth_anything_3"]
    with pytest.raises(sparsiattn.SparsiattnError, match="grid="):  # a window of one image
        sparsiattn.patch(host.make(None).eval(), "longformer", input=host.shape)
    with sparsiattn.patch(host.make(None).eval(), "local", k=0.25, input=host.shape) as patch:
        views = {site.views for site in patch.sites}
        assert len(views) == 2
        assert 1 in views
