"""Every timm model of the supported families: ``pytest -m census`` (a few minutes)."""

from __future__ import annotations

import pytest
import timm
import torch

import sparsiattn

GLOBS = ("vit_*", "deit*", "eva*", "beit*", "samvit_*", "hiera_*", "swin_*")
NAMES = sorted({name for glob in GLOBS for name in timm.list_models(glob)})


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
    import zoo

    model, x = zoo.build("vit"), torch.randn(batch, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, k=0.25, tile=(2, 2)):
        exact = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
