"""The parts of ``python benchmarks/many_views``: known matches, and what counts as kept."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from many_views import recall
from many_views.scenes import Scene

VIEWS, SIDE = 3, 12


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Of a photo whose red and green say where a pixel is."""
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    x, y = np.meshgrid(ramp, ramp)
    path = tmp_path / "photo.png"
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1)).save(path)
    return Scene.of(path, VIEWS, size=96, seed=1)


def test_matches_show_the_same_place(scene: Scene) -> None:
    matches = recall.others(scene.matches(SIDE))
    patches = torch.nn.functional.interpolate(scene.images, (SIDE, SIDE), mode="area")
    colours = patches.permute(0, 2, 3, 1).flatten(0, 2)
    known = matches >= 0
    assert 0.1 < known.float().mean() < 1
    query, view = known.nonzero(as_tuple=True)
    assert (matches[known] // SIDE**2 == view).all()
    far = (colours[query] - colours[matches[known]]).abs().amax(-1)
    # half a patch of a view, whose side is at most 0.8 of the photo's
    assert far.median() < 0.8 / SIDE
    assert far.max() < 2 / SIDE


def test_a_patch_matches_itself_in_its_own_view(scene: Scene) -> None:
    matches = scene.matches(SIDE)
    for view in range(VIEWS):
        own = view * SIDE**2 + torch.arange(SIDE**2)
        assert torch.equal(matches[view, :, view], own)
    apart = recall.others(matches).view(VIEWS, -1, VIEWS)
    assert all((apart[view, :, view] == -1).all() for view in range(VIEWS))


def test_recall_counts_known_matches_alone() -> None:
    matches = torch.tensor([[-1, 2], [-1, 3], [0, -1], [-1, -1]])
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 2] = mask[0, 0, 2, 1] = mask[0, 0, 3, 3] = True
    found = recall.recall(mask, matches)
    assert found == {"recall": pytest.approx(1 / 3), "density": 3 / 16, "matches": 3}


def test_the_scale_is_the_one_that_finds_matches() -> None:
    """Sharp where matches are the most alike, flat where they are not."""
    features = torch.nn.functional.normalize(torch.eye(4)[None, None].repeat(1, 1, 2, 1), dim=-1)
    right = torch.tensor([[-1, 4 + i] for i in range(4)] + [[i, -1] for i in range(4)])
    wrong = torch.where(right >= 0, (right + 1) % 4 + 4 * (right >= 4), -1)
    assert (
        recall.best_scale(features, right) > recall.SCALES[2]
    )  # beyond it nothing is left to gain
    assert recall.best_scale(features, wrong) == min(recall.SCALES)
