"""Other input sizes after patching, and where tokens stand then."""

from __future__ import annotations

import timm
import torch
from torch import nn

import sparsiattn
from sparsiattn import AttentionInputs, Site
from sparsiattn.strategies import Connectivity, Local, Planner, finish
from sparsiattn.strategies.basis import resize_table, resize_tables
from tests.support import zoo


def dynamic_vit() -> nn.Module:
    return timm.models.VisionTransformer(**zoo.TINY, dynamic_img_size=True).eval()


def grids_seen(model: nn.Module, live: sparsiattn.Patch, x: torch.Tensor) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        seen.append(inputs.query_grid)
        finish(planner(inputs), inputs, background=2)

    with live.observing(observe), torch.no_grad():
        model(x)
    return seen


def test_grids_follow_the_image_also_when_the_count_is_the_same() -> None:
    model = dynamic_vit()
    with torch.no_grad(), sparsiattn.patch(model, k=0.25, tile=(2, 2)) as live:
        for rows, columns in ((8, 8), (6, 12), (12, 6), (4, 16), (16, 4), (9, 8)):
            x = torch.randn(1, 3, 4 * rows, 4 * columns)
            assert grids_seen(model, live, x) == [(rows, columns)] * 2
            assert torch.isfinite(model(x)).all()


def test_intermediate_features_see_the_right_grid_too() -> None:
    model = dynamic_vit()
    with torch.no_grad(), sparsiattn.patch(model, k=0.25):
        model(torch.randn(1, 3, 16, 64))
        features = model.forward_intermediates(torch.randn(1, 3, 64, 16), intermediates_only=True)
    assert features[0].shape == (1, 48, 16, 4)


def test_set_input_size_after_patching() -> None:
    for family in ("vit", "swin"):
        model = zoo.build(family)
        with torch.no_grad(), sparsiattn.patch(model, k=0.3):
            model(zoo.images(model))
            size = {"vit": (48, 32), "swin": (96, 64)}[family]
            model.set_input_size(size)
            assert torch.isfinite(model(torch.randn(2, 3, *size))).all()


def test_tables_at_the_native_grid_are_untouched_and_pooling_keeps_its_weight() -> None:
    x = torch.zeros(1, 2, 65, 8)
    planner = Connectivity(k=0.2).planner(Site.of(x, x, x, prefix_tokens=1))
    assert torch.equal(resize_table(planner.up, (8, 8), (8, 8), 1), planner.up)
    down, up = resize_tables(planner.down, planner.up, (8, 8), (12, 10), 1)
    assert down.shape == (121, planner.down.shape[1])
    torch.testing.assert_close(down.sum(0), torch.ones(down.shape[1]), rtol=0.15, atol=0.05)
    torch.testing.assert_close(up[1:].sum(1), torch.ones(120), rtol=1e-4, atol=1e-4)
    assert (up[:1] == 0).all()


def test_resized_tables_are_cached_and_follow_their_weights() -> None:
    x = torch.randn(1, 2, 101, 8)
    inputs = AttentionInputs(x, x, x, 0.3, None, Site.of(x, x, x, prefix_tokens=1))
    native = torch.zeros(1, 2, 65, 8)
    planner = Connectivity(k=0.2).planner(Site.of(native, native, native, prefix_tokens=1))
    with torch.inference_mode():
        planner.scores(inputs)
    with torch.no_grad():
        first = planner._tables(inputs)
        assert planner._tables(inputs)[0] is first[0]
        planner.down.mul_(2)
        torch.testing.assert_close(planner._tables(inputs)[0], 2 * first[0])
    planner.down.requires_grad_(True)
    planner.scores(inputs).sum().backward()
    assert planner.down.grad is not None


def test_local_windows_are_the_nearest_patches() -> None:
    x = torch.zeros(1, 1, 50, 4)
    site = Site.of(x, x, x, prefix_tokens=1)
    inputs = AttentionInputs(x, x, x, 1.0, None, site)
    pattern = finish(Local(k=10).planner(site)(inputs), inputs)
    kept = pattern.to_mask()[0, 0, 1 + 3 * 7 + 3, 1:].view(7, 7)  # the centre of a 7 x 7 grid
    assert kept.sum() == 9
    assert kept[2:5, 2:5].all()
