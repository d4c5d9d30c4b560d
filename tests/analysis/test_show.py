"""`show`: what it says about attention and tokens, checked by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.analysis.visualization import AttentionView, recording
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support import zoo
from tests.support.pictures import picture


def shown(strategy: str = "topk", image: Any = None, **options: Any) -> AttentionView:
    model = tiny_vit()
    with sparsiattn.patch(model, strategy, **options):
        return sparsiattn.show(model, tiny_images(1) if image is None else image)


def dense_softmax(model: Any, images: Tensor, block: int) -> Tensor:
    """``[H, N, N]`` in double precision, from the host's own projection."""
    found = []
    hook = model.blocks[block].attn.qkv.register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        model(images)
    hook.remove()
    q, k, _ = found[0][0].double().view(65, 3, 3, 16).permute(1, 2, 0, 3)
    return (q @ k.mT / 4).softmax(-1)


@pytest.mark.parametrize("block", [0, 1])
def test_exact_attention_and_the_mass_kept_against_a_plain_softmax(block: int) -> None:
    expected = dense_softmax(tiny_vit(), tiny_images(1), block)
    site = shown(k=0.2).sites[block]
    assert torch.allclose(site.exact.double(), expected, atol=1e-6)
    # 13 keys: the class token, then the best 12 patches
    best = expected[:, 1:, 1:].topk(12, dim=-1).values.sum(-1) + expected[:, 1:, 0]
    assert torch.allclose(site.mass.double(), best.mean(-1), atol=1e-6)
    assert torch.allclose(site.density, torch.full((3,), 13 / 65))
    assert site.kept[:, 1:].sum(-1).unique().tolist() == [13]
    assert bool(site.kept[:, 0].all())  # the class token's own row is dense


def test_a_patch_seen_by_row_and_column() -> None:
    site = shown(k=0.2)["blocks.0.attn"]
    query = 1 + 8 * 4 + 2
    assert torch.equal(site.attention(4, 2).flatten(1), site.exact[:, query, 1:])
    assert torch.equal(site.attention(4, 2, "pattern").flatten(1), site.pattern[:, query, 1:])
    assert torch.equal(site.keys_kept(4, 2).flatten(1), site.kept[:, query, 1:])


@pytest.mark.parametrize("options", [{"background": None}, {"background": 2}, {"tile": (2, 2)}])
def test_the_pattern_is_what_the_patched_model_computes(options: dict[str, Any]) -> None:
    model, images, out = tiny_vit(), tiny_images(1), []
    with sparsiattn.patch(model, "connectivity", k=0.2, **options) as live, torch.no_grad():
        site = sparsiattn.show(model, images)[0]
        hook = model.get_submodule("blocks.0.attn.proj").register_forward_pre_hook(
            lambda m, args: out.append(args[0])
        )
        values: list[Tensor] = []
        with live.observing(lambda s, p, inputs: values.append(inputs.v)):
            model(images)
        out.clear()
        model(images)
        hook.remove()
    total = site.pattern.sum(-1) + site.background
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert bool((site.pattern > 0).eq(site.kept).all())
    if options.get("background") is None and "background" in options:
        expected = (site.pattern @ values[0][0]).transpose(0, 1).reshape(65, 48)
        assert torch.allclose(out[0][0], expected, atol=1e-5)
    else:
        assert float(site.background[:, 1:].mean()) > 0.05


def test_layers_heads_and_queries_chosen() -> None:
    model = tiny_vit()
    sparsiattn.patch(model, "topk", k=0.2)
    every = sparsiattn.show(model, tiny_images(1))
    some = sparsiattn.show(model, tiny_images(1), layers=-1, heads=[2], queries=[(4, 2), (7, 7)])
    assert [site.name for site in some.sites] == ["blocks.1.attn"]
    site = some[0]
    assert site.heads == (2,)
    assert site.queries.tolist() == [0, 1 + 8 * 4 + 2, 64]  # the class token comes along
    assert torch.equal(site.attention(4, 2)[0], every[1].attention(4, 2)[2])
    assert torch.equal(site.mass[0], every[1].mass[2])  # a mean over all queries all the same
    assert site.query(0, 0) == site.query(4, 2)  # the nearest that is there
    assert len(sparsiattn.show(model, tiny_images(1), layers="blocks.*").sites) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 2}, "below 2, the number of patched sites"),
        ({"layers": "blocks.7.*"}, "Did you mean"),
        ({"layers": [1.5]}, "indices or names"),
        ({"heads": 3}, "0..2"),
        ({"heads": []}, "0..2"),
        ({"queries": [(8, 0)]}, "8 x 8"),
        ({"queries": [3]}, "(row, column)"),
        ({"queries": []}, "at least one"),
    ],
)
def test_wrong_choices_say_what_is_there(options: dict[str, Any], says: str) -> None:
    model = tiny_vit()
    sparsiattn.patch(model, "topk", k=0.2)
    with pytest.raises(sparsiattn.SparsiattnError) as error:
        sparsiattn.show(model, tiny_images(1), **options)
    assert says in str(error.value)


def test_progress_counts_sites_and_a_disabled_patch_is_refused() -> None:
    model, told = tiny_vit(), []
    live = sparsiattn.patch(model, "topk", k=0.2)
    sparsiattn.show(model, tiny_images(1), progress=lambda *done: told.append(done))
    assert told == [(1, 2), (1, 2)]
    with live.disabled(), pytest.raises(sparsiattn.InvalidOption, match="disabled"):
        sparsiattn.show(model, tiny_images(1))


def test_an_unpatched_model_is_told_to_be_patched() -> None:
    with pytest.raises(sparsiattn.InvalidOption, match=r"sparsiattn\.patch"):
        sparsiattn.show(tiny_vit(), tiny_images(1))


def test_the_model_is_left_as_it_was() -> None:
    model, images = tiny_vit(), tiny_images(2)
    live = sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0])
    with torch.no_grad():
        before = model(images)
    model.train()
    model.get_submodule("blocks.1").eval()
    modes = [module.training for module in model.modules()]
    source, hooks, drawn = live.source(), counted(model), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sparsiattn.show(model, tiny_images(1))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(live.source(), source)
    assert counted(model) == hooks
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, weights[n]) for n, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), before)


def counted(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_model_that_raises_is_left_as_it_was_too() -> None:
    model = tiny_vit()
    sparsiattn.patch(model, "topk", k=0.2)
    model.train()
    hooks = counted(model)

    def fault(module: nn.Module, args: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.get_submodule("blocks.1.mlp").register_forward_pre_hook(fault)
    with pytest.raises(RuntimeError, match="on purpose"):
        sparsiattn.show(model, tiny_images(1))
    handle.remove()
    assert model.training
    assert counted(model) == hooks
    sparsiattn.show(model, tiny_images(1))


def test_images_in_every_form(tmp_path: Path) -> None:
    model, image = tiny_vit(), picture(3)
    sparsiattn.patch(model, "topk", k=0.2)
    image.save(tmp_path / "a.png")
    read = sparsiattn.show(model, image)
    from sparsiattn.training import data_config, image_transform

    tensor = image_transform(data_config(model), False, {})(image)
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)
    assert torch.equal(read.pixels, pixels)  # 32 pixels: nothing resized, nothing cropped
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), tensor, tensor[None]):
        again = sparsiattn.show(model, form)
        assert torch.equal(again[1].exact, read[1].exact)
        assert torch.equal(again.pixels, pixels)
    bytes_first = sparsiattn.show(model, pixels.permute(2, 0, 1))
    assert torch.equal(bytes_first[1].exact, read[1].exact)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(2, 3, 32, 32), "a batch of 2"),
        (torch.full((3, 32, 32), float("nan")), "NaN"),
        (torch.zeros(1, 32, 32), "[3, H, W]"),
        ("no-such-photo.jpg", "no-such-photo.jpg"),
        (7, "int"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, says: str) -> None:
    model = tiny_vit()
    sparsiattn.patch(model, "topk", k=0.2)
    with pytest.raises(sparsiattn.DataError) as error:
        sparsiattn.show(model, image)
    assert says in str(error.value)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(sparsiattn.DataError, match=r"a\.jpg"):
        shown(k=0.2, image=tmp_path / "a.jpg")


def test_too_many_queries_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    every = shown(k=0.2)
    monkeypatch.setattr(recording, "MOST", 2 * 3 * 65 * 20)
    monkeypatch.setattr("sparsiattn.runtime.attention_rows.CHUNK", 3 * 65 * 7)
    thin = shown(k=0.2)
    assert thin.step == 2
    site = thin[0]
    assert len(site.queries) == 1 + 16
    assert torch.allclose(site.mass, every[0].mass)  # still a mean over all queries
    assert torch.equal(site.attention(5, 5), every[0].attention(5, 5))
    assert site.query(4, 4) == site.query(4, 5) == site.query(5, 4) == site.query(5, 5)
    assert site.attention(4, 4).sum() > 0


@pytest.mark.parametrize("family", ["hiera", "twins", "pvt_v2", "mvitv2", "vit_differential"])
def test_hosts_without_a_raster_still_have_figures(family: str, tmp_path: Path) -> None:
    model = zoo.build(family)
    images = zoo.images(model, 1)
    sparsiattn.patch(model, "topk", k=0.25, input=images)
    found = sparsiattn.show(model, images)
    for site in found.sites:
        assert bool((site.mass >= site.density - 1e-5).all()), site.name
        assert (site.place is None) == bool(site.why)
    assert found.save(tmp_path / "a.html").stat().st_size > 10_000
    if family == "hiera":
        assert all(site.why for site in found.sites)
        with pytest.raises(sparsiattn.InvalidOption, match=r"raster|windows"):
            found[0].attention(0, 0)


def test_merged_tokens_share_their_attention_among_their_patches() -> None:
    model, images = tiny_vit(), tiny_images(1)
    with sparsiattn.patch(model, "token_merge", r=12) as live:
        found = sparsiattn.show(model, images)
        with torch.no_grad():
            model(images)
        assert torch.equal(found.tokens[-1].place.flatten() + 1, live.source()[0, 1:])
    first, last = found.tokens
    assert [first.count, last.count] == [52, 40]
    assert first.dropped == last.dropped == 0
    site = found["blocks.1.attn"]
    assert site.tokens == 53
    total = site.attention(2, 2).sum((1, 2)) + site.exact[:, site.query(2, 2), 0]
    assert torch.allclose(total, torch.ones(3), atol=1e-5)
    assert site.place is not None
    twins = (site.place == site.place[2, 2]).nonzero().tolist()
    assert all(site.query(r, c) == site.query(2, 2) for r, c in twins)


@pytest.mark.parametrize("fuse", [False, True])
def test_dropped_and_fused_tokens(fuse: bool) -> None:
    found = shown("token_drop", keep=0.5, layers=[0], fuse=fuse)
    first = found.tokens[0]
    assert first.name == "blocks.0"
    assert (first.count, first.dropped) == (32 + fuse, 32)
    site = found["blocks.1.attn"]
    assert site.fused == ((33,) if fuse else ())
    assert site.place is not None
    gone = site.place < 0
    assert int(gone.sum()) == 32
    row, column = gone.nonzero()[0].tolist()
    assert site.query(row, column) is None
    assert not site.attention(row, column).any()
    assert not site.keys_kept(row, column).any()
    row, column = (~gone).nonzero()[0].tolist()
    assert not site.attention(row, column)[:, gone].any()


def test_adaptive_counts_and_blocks_that_only_spare_the_mlp() -> None:
    found = shown("token_drop", keep="adaptive", mass=0.6, layers=[0])
    assert 0 < found.tokens[0].count < 64
    model = zoo.build("swin")
    with sparsiattn.patch(model, "token_drop", score="norm", keep=0.5):
        found = sparsiattn.show(model, zoo.images(model, 1))
    assert [block.count for block in found.tokens] == [128, 32, 16]
    assert all(block.mlp_only for block in found.tokens)
    assert found.tokens[0].place.shape == (16, 16)
    assert int((found.tokens[0].place >= 0).sum()) == 128


def test_sites_left_dense_say_so() -> None:
    found = shown(k=1.0)
    assert all(site.dense for site in found.sites)
    assert torch.allclose(found[0].mass, torch.ones(3))
    assert torch.equal(found[0].exact, found[0].pattern)
    assert "blocks.0.attn: dense" in str(found)


def test_half_precision_is_computed_in_single() -> None:
    model = tiny_vit().to(torch.bfloat16)
    sparsiattn.patch(model, "topk", k=0.2)
    site = sparsiattn.show(model, tiny_images(1))[0]
    assert site.exact.dtype == torch.float32
    assert torch.allclose(site.exact.sum(-1), torch.ones(3, 65), atol=1e-6)


def test_plain_values_for_json() -> None:
    found = shown("hybrid", k=0.2, keep=0.5, layers=[0], only_if_faster=False)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["strategy"]["name"] == "hybrid"
    assert plain["tokens"][0]["tokens"] == found.tokens[0].count
    assert plain["sites"][0]["mass"] == pytest.approx(found[0].mass.tolist(), abs=1e-6)
    assert "rows" not in plain["sites"][0]
    rows = json.loads(json.dumps(found.to_dict(rows=True)))["sites"][0]["rows"]
    assert torch.tensor(rows["exact"]).shape == found[0].exact.shape
    assert repr(found) == "<AttentionView: VisionTransformer, hybrid k=0.2 keep=0.5, 2 sites>"


def test_files_are_named_by_what_is_in_them(tmp_path: Path) -> None:
    found = shown(k=0.2)
    with pytest.raises(sparsiattn.InvalidOption, match=r"\.html"):
        found.save(tmp_path / "a.txt")
    with pytest.raises(sparsiattn.UnknownName, match=r"blocks\.1\.attn"):
        found["blocks.2.attn"]


@pytest.mark.slow
def test_the_page_of_a_vit_s_is_small(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch16_224").eval()
    with torch.no_grad():  # sharp attention, whose page is the largest
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)
    sparsiattn.patch(model, "connectivity", k=0.25)
    found = sparsiattn.show(model, torch.randn(3, 224, 224))
    assert found.step == 1
    assert found.save(tmp_path / "a.html").stat().st_size < 5e6
