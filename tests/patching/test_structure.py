"""How a model's sequences lie in the image: known from the pixels, from the user, or a guess."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

import sparsiattn
from sparsiattn import GuessedStructure, InvalidOption, InvalidType, SparsiattnError
from tests.support.sequences import SequenceViT, drawn

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4}
TINY |= {"num_heads": 3, "num_classes": 5}


def attended(model: nn.Module, image: Tensor, position: int) -> set[int]:
    """Positions, in the host's sequence, of the keys that one query of the first site sees."""
    attn: Any = next(m for m in model.modules() if hasattr(m, "qkv"))
    width, head, counts, reached = attn.proj.in_features, attn.head_dim, [], set()
    attn.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    outputs: list[Tensor] = []
    attn.proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(image)
    for start in range(0, counts[0], head):
        rows = min(head, counts[0] - start)

        def mark(_: nn.Module, args: Any, output: Tensor, start: int = start, n: int = rows) -> Any:
            marked = torch.zeros_like(output)  # even attention, values that name their key
            marked[:, start : start + n, 2 * width : 2 * width + n] = torch.eye(n)
            return marked

        handle = attn.qkv.register_forward_hook(mark)
        model(image)
        handle.remove()
        seen = outputs[-1][0, position, :rows]
        reached |= {start + int(i) for i in (seen > 0).nonzero().flatten()}
    return reached


def square_around(row: int, column: int, columns: int, offset: int) -> set[int]:
    """Positions of the 3 x 3 patches around one, in a sequence where patches start at offset."""
    return {
        offset + r * columns + c
        for r in range(row - 1, row + 2)
        for c in range(column - 1, column + 2)
    }


@given(
    rows=st.integers(3, 7),
    columns=st.integers(3, 7),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_special_tokens_at_both_ends_are_never_patches(
    rows: int, columns: int, prefix: int, suffix: int
) -> None:
    model = drawn(SequenceViT((4 * rows, 4 * columns), prefix=prefix, suffix=suffix))
    special = prefix + suffix
    x = torch.randn(1, 3, 4 * rows, 4 * columns)
    with torch.no_grad():
        with sparsiattn.patch(model, "local", k=9 + special, background=None, input=x) as patch:
            site = patch.sites[0]
            assert (site.grid, site.prefix_tokens) == ((rows, columns), special)
            assert (site.leading_tokens, site.suffix_tokens) == (prefix, suffix)
            n = prefix + rows * columns
            ends = {*range(prefix), *range(n, n + suffix)}
            middle = prefix + columns + 1
            assert attended(model, x, middle) == ends | square_around(1, 1, columns, prefix)
        with sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0], input=x) as patch:
            model(x)
            places = patch.source()[0]
            kept = -(-rows * columns // 2)
            assert places[:prefix].tolist() == list(range(prefix))
            assert places[n:].tolist() == list(range(prefix + kept, special + kept))
            assert int((places[prefix:n] >= 0).sum()) == kept


@pytest.mark.parametrize("strategy", ["token_drop", "token_merge"])
def test_suffix_tokens_read_the_same_wherever_they_stand(strategy: str) -> None:
    """Without positions, special tokens in front or behind are one model, so one answer."""
    options: dict[str, Any] = {"token_drop": {"keep": 0.5}, "token_merge": {"r": 6}}[strategy]
    behind, ahead = drawn(SequenceViT(prefix=1, suffix=3)), drawn(SequenceViT(prefix=4))
    ahead.load_state_dict(behind.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(behind(x), ahead(x))
        for model in (behind, ahead):
            sparsiattn.patch(model, strategy, input=x, **options)
        torch.testing.assert_close(behind(x), ahead(x), rtol=1e-4, atol=1e-5)
        assert behind.norm is not None


@pytest.mark.parametrize("strategy", ["topk", "connectivity", "local"])
def test_attention_strategies_serve_suffix_tokens_as_those_in_front(strategy: str) -> None:
    behind, ahead = drawn(SequenceViT(prefix=1, suffix=3)), drawn(SequenceViT(prefix=4))
    ahead.load_state_dict(behind.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = behind(x)
        for model in (behind, ahead):
            sparsiattn.patch(model, strategy, k=0.25, input=x)
        torch.testing.assert_close(behind(x), ahead(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(behind(x), dense, atol=1e-3)


def test_special_tokens_in_every_view() -> None:
    model = drawn(SequenceViT((16, 24), prefix=0, specials=2))
    x = torch.randn(1, 3, 3, 16, 24)
    with torch.no_grad(), sparsiattn.patch(model, "topk", k=10, input=x.shape) as patch:
        structure = patch.sites[0].structure
        assert structure is not None
        assert (structure.views, structure.grid, structure.specials) == (3, (4, 6), (0, 1))
        seen = attended(model, x, 5)
        assert {0, 1, 26, 27, 52, 53} <= seen
        assert len(seen) == 10
    with pytest.raises(InvalidOption, match="special tokens between patches"):
        sparsiattn.patch(model, "token_drop", input=x.shape)


@pytest.mark.parametrize("order", [[5, 1, 40, 22, 13, 9, 60, 33], [*range(63, -1, -1)]])
def test_patches_out_of_order_are_no_raster(order: list[int]) -> None:
    model = drawn(SequenceViT(order=order))
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(SparsiattnError, match="'local' needs to know where tokens are"):
        sparsiattn.patch(model, "local", input=x)
    with torch.no_grad(), sparsiattn.patch(model, tile=(2, 2), input=x) as patch:
        assert "patches not in raster order (traced from the image" in str(patch.report())
        assert {row.tile for row in patch.report().sites} == {1}
        assert torch.isfinite(model(x)).all()


def test_patches_dropped_in_training_are_noticed() -> None:
    model = VisionTransformer(**TINY, patch_drop_rate=0.5)
    x = torch.randn(2, 3, 32, 32)
    with sparsiattn.patch(model, "local"):
        assert torch.isfinite(model.eval()(x)).all()
        with pytest.raises(SparsiattnError, match="33 tokens, whose positions in the image"):
            model.train()(x)
    grids = []
    with sparsiattn.patch(model, k=0.5, tile=(2, 2), background=2) as patch:
        with patch.observing(lambda site, planner, inputs: grids.append(inputs.query_grid)):
            model.train()(x)
        assert set(grids) == {(1, 32)}
        assert torch.isfinite(model.train()(x)).all()


@pytest.mark.parametrize("rows_first", [True, False])
def test_the_grid_is_that_of_the_tokens_not_of_the_image(rows_first: bool) -> None:
    size = (24, 48) if rows_first else (48, 24)
    vit = drawn(VisionTransformer(**{**TINY, "img_size": size}))
    resize = v2.Resize(size)
    pipe = nn.Sequential(resize, v2.Normalize([0.5] * 3, [0.5] * 3), vit)
    grids = []
    with sparsiattn.patch(pipe, "local", input=(1, 3, 32, 32)) as patch:
        observing = patch.observing(lambda site, _, inputs: grids.append(inputs.query_grid))
        with torch.no_grad(), observing:
            for shape in ((32, 32), (90, 30), (30, 90)):
                pipe(torch.randn(1, 3, *shape))
    assert set(grids) == {(size[0] // 4, size[1] // 4)}


def test_bags_of_images_have_the_grid_of_each() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = drawn(VisionTransformer(**{**TINY, "dynamic_img_size": True}))

        def forward(self, bag: Tensor) -> Any:
            return self.vit(bag.flatten(0, 1)).unflatten(0, bag.shape[:2]).mean(1)

    model, grids = Bag(), []
    with torch.no_grad(), sparsiattn.patch(model, "local", input=(1, 3, 3, 32, 24)) as patch:
        assert patch.sites[0].grid == (8, 6)
        with patch.observing(lambda site, _, inputs: grids.append(inputs.query_grid)):
            model(torch.randn(2, 5, 3, 24, 40))
    assert set(grids) == {(6, 10)}


def test_what_nothing_tells_is_a_guess_and_says_so() -> None:
    class Shuffled(SequenceViT):
        def sequence(self, image: Tensor) -> Tensor:
            x = super().sequence(image)
            # indices that follow from values: a run without data does not have them
            return x.gather(1, x.argsort(dim=1))

    model, x = drawn(Shuffled()), torch.randn(1, 3, 32, 32)
    with pytest.warns(GuessedStructure, match=r"is a guess.*patch\(\.\.\., grid="):
        patch = sparsiattn.patch(model, "topk", input=x)
    assert "(guess)" in str(patch.report())
    patch.unpatch()
    assert "(guess)" in str(sparsiattn.inspect(model, x, strategies=[]))
    for strategy in ("local", "token_drop", "token_merge", "longformer"):
        with pytest.raises(InvalidOption, match=r"grid=\(rows, columns\), prefix="):
            sparsiattn.patch(model, strategy, input=x)
    with torch.no_grad(), sparsiattn.patch(model, "local", input=x, grid=(8, 8), prefix=1) as patch:
        assert "given by the user" in str(patch.report())
        assert torch.isfinite(model(x)).all()


def test_the_report_names_the_source() -> None:
    model = VisionTransformer(**TINY, reg_tokens=2)
    with sparsiattn.patch(model) as patch:
        line = "3 prefix tokens, 8 x 8 patches (traced from the image through 'patch_embed.proj')"
        assert line in str(patch.report())
    assert line in str(sparsiattn.inspect(model, strategies=["topk"]))


@pytest.mark.parametrize(
    "given_structure",
    [{"grid": (3, 5)}, {"prefix": 3}, {"suffix": 2}, {"grid": (2, 4, 8), "specials": 3}],
    ids=str,
)
def test_contradictions_name_both_sides(given_structure: dict[str, Any]) -> None:
    model = VisionTransformer(**TINY)
    with pytest.raises(InvalidOption, match=r"gives \d+ tokens .* has 65, found as"):
        sparsiattn.patch(model, "topk", **given_structure)
    assert sparsiattn.patch_of(model) is None


@pytest.mark.parametrize(
    "given_structure", [{"grid": 8}, {"grid": (8,)}, {"prefix": -1}, {"specials": "cls"}], ids=str
)
def test_structures_of_the_wrong_type(given_structure: dict[str, Any]) -> None:
    with pytest.raises(InvalidType):
        sparsiattn.patch(VisionTransformer(**TINY), "topk", **given_structure)


def test_what_the_user_said_is_saved(tmp_path: Any) -> None:
    model = drawn(VisionTransformer(**{**TINY, "img_size": 32}))
    with sparsiattn.patch(model, "local", k=0.2, grid=(4, 16)) as patch:
        patch.save(tmp_path)
    with sparsiattn.load(model, tmp_path) as patch:
        assert patch.sites[0].grid == (4, 16)


@pytest.mark.parametrize("name", ["swin", "pvt_v2", "mobilevit", "tnt", "volo"])
def test_hierarchies_are_traced(name: str) -> None:
    from tests.support import zoo

    side = zoo.HIERARCHIES[name][1] if name in zoo.HIERARCHIES else 64
    inspection = sparsiattn.inspect(zoo.build(name), (1, 3, side, side), strategies=[])
    assert all("traced from the image" in site.structure for site in inspection.sites)


def test_two_shapes_in_one_backward_pass_have_their_own_grids() -> None:
    images = torch.randn(2, 3, 16, 64), torch.randn(2, 3, 64, 16)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = drawn(timm.models.VisionTransformer(**TINY, dynamic_img_size=True)).train()
        model.set_grad_checkpointing(checkpointing)
        sparsiattn.patch(model, "local", k=0.2)
        sum(model(x).square().sum() for x in images).backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)
