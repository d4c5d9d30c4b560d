"""The support matrix says what is: its cells, run again."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from tests.support import ROOT, families, matrix

FAMILIES = families.families()
SLOW = {
    name
    for name in FAMILIES
    if name.startswith("torchvision/") or name.split("/")[1] in families.HEAVY | families.TWINS
}
STORED = ROOT / "benchmarks" / "results" / "support.json"


@cache
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text())["matrix"]
    return found


def agree(now: dict[str, str], then: dict[str, str]) -> None:
    """Kernel by kernel; the words of a refusal may be put better since."""
    for kernel, outcome in now.items():
        assert not outcome.startswith("fails"), f"{kernel}: {outcome}"
        if kernel in then:
            assert outcome.split(":")[0] == then[kernel].split(":")[0], f"{kernel}: {outcome}"


def _marked(names: set[str]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow) if n in names else n for n in FAMILIES]


@pytest.mark.parametrize("family", _marked(SLOW))
def test_family(family: str) -> None:
    subject = matrix.subject(FAMILIES[family]())
    agree(matrix.cells(subject, "topk", []), stored()[family]["cells"]["topk"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell(family: str) -> None:
    subject = matrix.subject(FAMILIES[family]())
    usable = [name for name, reason in matrix.kernels().items() if not reason]
    for column in matrix.COLUMNS:
        agree(matrix.cells(subject, column, usable), stored()[family]["cells"][column])


def test_every_family_of_the_census_is_in_the_matrix() -> None:
    census = STORED.parent / "census" / "timm.jsonl"
    rows = map(json.loads, census.read_text().splitlines())
    attending = {row["family"] for row in rows if row.get("attention")}
    assert attending <= set(families.TIMM)
