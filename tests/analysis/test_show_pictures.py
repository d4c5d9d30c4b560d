"""Pictures of `sparsiattn.show`: what is painted where."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

import sparsiattn
from sparsiattn.analysis.visualization import AttentionView, paint
from sparsiattn.analysis.visualization.figures import MOST, _some
from sparsiattn.testing import tiny_images, tiny_vit

VIEWS = ("overview", "layers", "heads", "density")


def shown(strategy: str = "topk", model: Any = None, **options: Any) -> AttentionView:
    model = tiny_vit() if model is None else model
    with sparsiattn.patch(model, strategy, **options):
        return sparsiattn.show(model, tiny_images(1))


def texts(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_every_view_of_an_attention_strategy() -> None:
    found = shown(k=0.25)
    for view in VIEWS:
        figure = found.figure(view)
        assert "topk k=0.25" in texts(figure)
        assert [axis for axis in figure.findobj(Axes) if axis.images], "nothing was drawn"


def test_a_picture_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    path = shown(k=0.25).save(tmp_path / "new" / "shares.png", "density")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 250
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100, "nothing was drawn"


def test_the_overview_says_what_each_query_keeps() -> None:
    found = shown(k=0.25)
    site = found.sites[1]
    query = site.query(*found.points[0].on((8, 8)))
    mass = 100 * float((site.exact * site.kept)[:, query].sum(-1).mean())
    assert f"17 of 65 keys, {mass:.0f} % of the attention" in texts(found.figure(site=1))


def test_the_figure_of_density_is_the_share_of_each_head() -> None:
    found = shown(k=0.25)
    drawn = found.figure("density")
    density, mass = (axis.images[0].get_array() for axis in drawn.axes)
    for row, site in enumerate(found.sites):
        np.testing.assert_allclose(density[row], 100 * site.density.numpy(), rtol=1e-5)
        np.testing.assert_allclose(mass[row], 100 * site.mass.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "options"), [("token_drop", {"keep": 0.5}), ("token_merge", {"r": 8})]
)
def test_tokens_left_are_the_overview_of_a_token_strategy(
    strategy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    found = shown(strategy, tiny_vit(depth=4), **options)
    for view in ("overview", "tokens"):
        written = texts(found.figure(view))
        counts = sorted({block.count for block in found.tokens} - {64})
        assert counts
        assert all(f"{count} tokens left" in written for count in counts)
    svg = found.save(tmp_path / "tokens.svg", "tokens").read_text(encoding="utf-8")
    assert svg.count("<image") == 1 + len(counts)


def test_without_tokens_dropped_there_is_no_such_view() -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="needs a token strategy"):
        shown(k=0.25).figure("tokens")


def test_attention_is_brightest_where_it_is_largest() -> None:
    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    black = np.zeros((32, 32, 3), dtype=np.uint8)
    picture = paint.heat(black, values, float(values.max())).astype(int).sum(-1)
    assert picture.shape == (224, 224)
    by_patch = picture.reshape(8, 28, 8, 28)
    assert (by_patch == by_patch[:, :1, :, :1]).all(), "a patch has one colour"
    order = by_patch[:, 0, :, 0].flatten()[values.flatten().argsort()]
    assert (np.diff(order) >= 0).all()
    assert order[0] < order[-1]


def test_kept_keys_are_lit_and_the_others_dark() -> None:
    photo = np.full((32, 32, 3), 200, dtype=np.uint8)
    share = np.zeros((8, 8))
    share[2, 5], share[3, 0] = 1.0, 0.5
    picture = paint.spotlight(photo, share)[::28, ::28, 0]
    assert picture[2, 5] == 200
    assert (picture < 50).sum() == 62
    assert 50 < picture[3, 0] < 200


def test_merged_patches_have_one_colour_and_dropped_ones_are_dark() -> None:
    photo = np.random.default_rng(0).integers(100, 256, (224, 224, 3), dtype=np.uint8)
    place = np.arange(16).reshape(4, 4)
    place[0, 1] = 0  # merged with the patch beside it
    place[3, 3] = -1
    place[3, 2] = 15  # in a token that holds what was fused
    picture = paint.tokens(photo, place, fused=[15])
    merged = picture[:56, :112][1:-2, 1:-2].reshape(-1, 3)
    assert (merged == merged[0]).all()
    assert picture[170:, 115:].max() < 50
    assert (picture[60:110, 60:110] == photo[60:110, 60:110]).all(), "others are left alone"
    assert (picture[55, :112] == 255).all(), "a white line below the group"
    later = np.where(place > 3, place - 1, place)  # another token was dropped before: same tint
    later[1, 0] = -1
    assert (paint.tokens(photo, later, fused=[14])[10, 10] == merged[0]).all()


def test_many_layers_are_thinned_out_evenly() -> None:
    chosen = _some(list(range(100)), MOST)
    assert len(chosen) == MOST
    assert (chosen[0], chosen[-1]) == (0, 99)
    assert set(np.diff(chosen)) <= {4, 5}


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shown(k=0.25)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert len(found.html()) > 10_000
    for view in VIEWS:
        with pytest.raises(sparsiattn.InvalidOption, match=r"pip install 'sparsiattn\[viz\]'"):
            found.figure(view)
