"""Tiles and summary keys larger than the grids of a model: refused, or cut where images shrink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import models

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.serialization.files import with_checksum
from tests.support import zoo
from tests.support.refusals import refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"background": 9}, ("background=9", "'blocks.0.attn'", "8 x 8", "background=8")),
        ({"tile": (9, 2)}, ("tile=(9, 2)", "8 x 8", "tile=(8, 8)")),
        ({"tile": (4, 4), "block": (2, 9)}, ("block=(2, 9)", "block=(8, 8)")),
    ],
)
def test_the_error_names_what_would_do(options: dict[str, Any], says: tuple[str, ...]) -> None:
    model = zoo.build("vit")  # 8 x 8 patches
    refused(model, ValueError, says, strategy="connectivity", k=0.25, **options)
    name = next(reversed(options))
    good = {**options, name: 8 if name == "background" else (8, 8)}
    with torch.no_grad(), sparsiattn.patch(model, k=0.25, **good):
        assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_summary_keys_must_fit_every_window_and_a_tile_one_grid() -> None:
    model = zoo.build("mvitv2")
    x = (1, 3, 64, 64)
    grids = {site.name: site.key_grid for site in sparsiattn.patch(model, "topk", input=x).sites}
    sparsiattn.unpatch(model)
    smallest, largest = min(map(min, grids.values())), max(map(min, grids.values()))
    assert smallest < largest
    with pytest.raises(InvalidOption, match=f"at most background={smallest}") as caught:
        sparsiattn.patch(model, "topk", background=largest, input=x)
    (named,) = [name for name in grids if f"{name!r}" in str(caught.value)]
    assert min(grids[named]) < largest
    for options in ({"background": "auto"}, {"background": smallest}, {"tile": (4, 4)}):
        with sparsiattn.patch(model, "topk", input=x, **options) as patch:  # type: ignore[arg-type]
            assert patch.sites


class OfStrips(torch.nn.Module):
    """Attention of a strip of patches, too narrow for two summary keys in each direction."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_a_default_that_does_not_fit_is_cut_down() -> None:
    model, x = torch.nn.Sequential(OfStrips()), torch.randn(1, 64, 16)
    options: dict[str, Any] = {"k": 0.25, "input": (x,), "grid": (64, 1)}
    with torch.no_grad():
        with sparsiattn.patch(model, "local", background=None, **options):
            bare = model(x)
        with sparsiattn.patch(model, "local", **options):
            summarised = model(x)
    assert torch.isfinite(summarised).all()
    assert not torch.equal(summarised, bare)
    for strategy in ("local", "topk"):
        with pytest.raises(InvalidOption, match="at most background=1"):
            sparsiattn.patch(model, strategy, background=3, **options)


def test_smaller_images_and_fewer_tokens_cut_them_down() -> None:
    model = models.VisionTransformer(**zoo.TINY, dynamic_img_size=True).eval()
    with torch.no_grad(), sparsiattn.patch(model, k=0.25, background=8, tile=(8, 8)):
        assert torch.isfinite(model(torch.randn(1, 3, 16, 16))).all()
    hybrid = {"strategy": "hybrid", "k": 0.25, "keep": 0.25, "background": 8, "layers": [0]}
    with torch.no_grad(), sparsiattn.patch(model, **hybrid, only_if_faster=False):
        assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_folders_saved_before_that_was_refused_still_load(tmp_path: Path) -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, "topk", k=0.25, background=8) as patch:
        before = model(x)
        patch.save(tmp_path)
    file = tmp_path / "sparsiattn.json"
    config = json.loads(file.read_text())
    config["strategy"]["options"]["background"] = 50
    file.write_text(json.dumps(with_checksum(config)))
    with torch.no_grad(), sparsiattn.load(model, tmp_path):
        assert torch.equal(model(x), before)
