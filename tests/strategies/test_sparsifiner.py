"""Agreement with the outputs of the authors' own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import sparsiattn
from sparsiattn import AttentionInputs, Site
from sparsiattn.kernels import Kernel, sparsiattn_kernels
from sparsiattn.strategies import Connectivity, finish

NAMES = {"proj_n": "down", "proj_back_n": "up"}
NAMES |= {f"proj_c_{x}.{p}": f"project_{x}.{p}" for x in "qk" for p in ("weight", "bias")}


@pytest.fixture(scope="module")
def attention(fixtures: Path) -> dict[str, Tensor]:
    return load_file(fixtures / "sparsifiner-attention-n65.safetensors")


def paper_exact(data: dict[str, Tensor]) -> tuple[AttentionInputs, object]:
    q, k, v = data["q"], data["k"], data["v"]
    site = Site.of(q, k, v, prefix_tokens=1)
    strategy = Connectivity(
        k=0.25, basis=10, channels=16, basis_threshold=0.02, basis_coef_topk=8, head_scale=True,
        tile=1, background=None, prefix_keys=False, mean_query_boost=False, self_weight=None,
    )  # fmt: skip
    planner = strategy.planner(site)
    weights = {ours: data[f"weight.mask_predictor.{theirs}"] for theirs, ours in NAMES.items()}
    planner.load_state_dict(weights)
    return AttentionInputs(q, k, v, q.shape[-1] ** -0.5, None, site), planner


def test_scores_and_masks_are_the_authors(attention: dict[str, Tensor]) -> None:
    inputs, planner = paper_exact(attention)
    torch.testing.assert_close(planner.scores(inputs), attention["score"], rtol=1e-5, atol=1e-5)
    mask = finish(planner(inputs), inputs, prefix_keys=False).to_mask()
    assert torch.equal(mask, attention["mask"])


HERE = [kernel for kernel in sparsiattn_kernels() if kernel.name in ("reference", "sdpa", "gather")]


@pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)
def test_outputs_are_the_authors(attention: dict[str, Tensor], kernel: Kernel) -> None:
    inputs, planner = paper_exact(attention)
    pattern = finish(planner(inputs), inputs, prefix_keys=False)
    assert kernel.why_not(inputs, pattern) == []
    heads = kernel(inputs, pattern).transpose(1, 2).flatten(2)
    out = heads @ attention["weight.proj.weight"].mT + attention["weight.proj.bias"]
    torch.testing.assert_close(out, attention["out"], rtol=1e-5, atol=1e-5)


def published_model(fixtures: Path) -> tuple[torch.nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    path = fixtures / "sparsifiner-model-n65.safetensors"
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    data = load_file(path)
    model = timm.models.VisionTransformer(
        img_size=int(meta["img_size"]), patch_size=int(meta["patch_size"]), num_classes=10,
        embed_dim=int(meta["embed_dim"]), depth=int(meta["depth"]),
        num_heads=int(meta["num_heads"]),
    ).eval()  # fmt: skip
    weights = {n.removeprefix("weight."): t for n, t in data.items() if n.startswith("weight.")}
    return model, data, weights


def test_load_sparsifiner_gives_the_authors_logits_and_masks(fixtures: Path) -> None:
    model, data, weights = published_model(fixtures)
    live = sparsiattn.load_sparsifiner(model, weights, keep=0.25)
    masks: list[Tensor] = []

    with torch.no_grad():
        torch.testing.assert_close(model(data["x"]), data["logits"], rtol=1e-5, atol=1e-5)
        # masks of later layers depend on sparse earlier ones, so they are read while it runs
        for runtime in live.runtimes:
            original = runtime.finish
            runtime.finish = lambda p, i, f=original: masks.append(f(p, i).to_mask()) or f(p, i)
        model(data["x"])
    for index, mask in enumerate(masks):
        assert torch.equal(mask, data[f"mask.{index}"])
    assert len(masks) == 3


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "predictor"])
def test_a_wrong_state_dict_leaves_the_model_untouched(fixtures: Path, fault: str) -> None:
    model, _, weights = published_model(fixtures)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    if fault == "missing":
        del weights["norm.weight"]
    elif fault == "extra":
        weights["surplus"] = torch.zeros(1)
    elif fault == "shape":
        weights["blocks.1.attn.mask_predictor.proj_n"] = torch.zeros(65, 9)
    else:
        weights = {n: t for n, t in weights.items() if "mask_predictor" not in n}
    with pytest.raises(sparsiattn.MismatchedPatch):
        sparsiattn.load_sparsifiner(model, weights, keep=0.25)
    assert sparsiattn.patch_of(model) is None
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("tile", [1, (2, 2), (3, 2)])
def test_own_keys_get_their_share(tile: object) -> None:
    """A query's own key, or those of a tile's queries, score so many times the row's sum more."""
    site = Site(
        name="site", index=0, depth=1, tokens=65, keys=65, heads=2, head_dim=8, value_dim=8,
        grid=(8, 8), key_grid=(8, 8), prefix_tokens=1,
    )  # fmt: skip
    q, k, v = torch.randn(3, 3, 2, 65, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    inputs = AttentionInputs(q, k, v, 0.4, None, site, tile=tile)  # type: ignore[arg-type]
    without, own = (
        Connectivity(k=0.2, self_weight=share).planner(site).scores(inputs) for share in (None, 0.3)
    )
    tiles = inputs.tiles
    rows = (
        [[i] for i in range(64)]
        if tiles is None
        else [sorted(set(t)) for t in tiles.order.tolist()]
    )
    more = torch.zeros(len(rows), 65)
    for row, members in enumerate(rows):
        more[row, [1 + i for i in members]] = 1 / len(members)
    expected = without + 0.3 * without.sum(-1, keepdim=True) * more
    torch.testing.assert_close(own, expected)


def test_other_keys_than_the_queries_have_no_own() -> None:
    site = Site(
        name="site", index=0, depth=1, tokens=64, keys=16, heads=2, head_dim=8, value_dim=8,
        grid=(8, 8), key_grid=(4, 4), prefix_tokens=0,
    )  # fmt: skip
    assert Connectivity(k=0.2).planner(site).self_weight is None


@pytest.mark.parametrize("weight", [-0.1, "much", True])
def test_self_weight_must_be_a_share(weight: object) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="self_weight must be None or a number >= 0"):
        Connectivity(self_weight=weight)  # type: ignore[arg-type]
