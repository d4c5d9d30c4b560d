"""Every model by name: ``pytest -m census`` (an hour or two on two cores).

What a run found is kept under ``benchmarks/results/census`` and on the support page of the docs.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import timm
import torch

import sparsiattn
from tests.support import ROOT, census

GLOBS = ("vit_*", "deit*", "eva*", "beit*", "samvit_*", "hiera_*", "swin_*")
NAMES = sorted({name for glob in GLOBS for name in timm.list_models(glob)})


RESULTS = ROOT / "benchmarks" / "results"


@cache
def totals(library: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "support.json").read_text())["census"]
    return found[library]  # type: ignore[no-any-return]


def _entries(library: str) -> list[Any]:
    if find_spec(library) is None:
        return []
    return [pytest.param(entry, id=entry.name) for entry in census.LISTS[library]()]


def keeps_the_laws(library: str, entry: census.Entry) -> None:
    """Patches by the laws, or is refused for a reason that the support page lists."""
    row = census.row_of(entry, values=True)
    assert row["status"] != "failed", row["faults"]
    assert not row.get("missed"), f"attention stays dense and is not named: {row['missed']}"
    if row["status"] == "refused":
        listed = [name for names in totals(library)["refused"].values() for name in names]
        assert entry.name in listed, row["reason"]


@pytest.mark.census
@pytest.mark.parametrize("entry", _entries("timm"))
def test_timm(entry: census.Entry) -> None:
    keeps_the_laws("timm", entry)


@pytest.mark.census
@pytest.mark.parametrize("entry", _entries("torchvision"))
def test_torchvision(entry: census.Entry) -> None:
    keeps_the_laws("torchvision", entry)


@pytest.mark.census
@pytest.mark.parametrize("entry", _entries("transformers"))
def test_transformers(entry: census.Entry) -> None:
    keeps_the_laws("transformers", entry)


def test_nearly_all_of_timm_with_attention_patch() -> None:
    """By the figures on the support page."""
    found = totals("timm")
    assert found["models"] >= 1371
    assert found["with_attention"] >= 661
    assert found["status"].get("failed", 0) == 0
    assert found["status"]["patched"] >= 0.97 * found["with_attention"]


@pytest.mark.census
@pytest.mark.parametrize("name", NAMES)
def test_patches_and_restores(name: str) -> None:
    """On the meta device: sites are found, reported with a real saving, and undone."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    keys = list(model.state_dict())
    with sparsiattn.patch(model, k=0.25) as live:
        report = live.report()
        assert len(live.sites) > 0
        assert report.mhsa_macs is not None
        assert report.mhsa_macs < report.mhsa_macs_dense
        for site in live.sites:
            assert site.grid[0] * site.grid[1] + site.prefix_tokens == site.tokens
            assert not site.raster or site.grid[0] > 1, f"no 2-D grid at {site.name}"
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_inductor_compiles_the_whole_model(batch: int) -> None:
    from tests.support import zoo

    model, x = zoo.build("vit"), torch.randn(batch, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, k=0.25, tile=(2, 2)):
        exact = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
