"""Token strategies against plain loops, closed forms and the published figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn import list_kernels
from sparsiattn.attention import Lengths
from sparsiattn.kernels import MaskedSDPA, Reference
from sparsiattn.patching import token_plan
from sparsiattn.strategies import TokenDrop
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit
from tests.support import zoo
from tests.support.plain_vit import PlainViT


@pytest.fixture(autouse=True)
def _short_with_restore_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look at the short sequence itself, on hosts whose head averages it too."""
    decide = token_plan._let_restore

    def unless_none(state: Any, tokens: Any, consumers: Any) -> None:
        if tokens.restore is not None:
            decide(state, tokens, consumers)

    monkeypatch.setattr(token_plan, "_let_restore", unless_none)


def evit(keep: float, layers: list[int], fuse: bool, prefix: int, classes: int) -> Any:
    def reduce(index: int, x: Tensor, weights: Tensor, keys: Tensor, size: list[float]) -> Any:
        if index not in layers:
            return None
        n = len(x) - prefix
        score = [float(weights[:, :classes, prefix + j].mean()) for j in range(n)]
        kept = sorted(sorted(range(n), key=lambda j: -score[j])[: math.ceil(keep * n)])
        rows = [x[i] for i in range(prefix)] + [x[prefix + j] for j in kept]
        place = {j: kept.index(j) if j in kept else -1 for j in range(n)}
        if fuse:
            rows.append(sum(score[j] * x[prefix + j] for j in range(n) if j not in kept))
            place = {j: p if p >= 0 else len(kept) for j, p in place.items()}
        return torch.stack(rows), [1.0] * len(rows), place

    return reduce


def tome(rate: Any, prefix: int, energy: Any = None, whole: Any = None) -> Any:
    """ToMe by loops; with ``energy(index, cosines)`` PiToMe's choice of the two sides."""

    def reduce(index: int, x: Tensor, weights: Tensor, keys: Tensor, size: list[float]) -> Any:
        n = len(x) - prefix
        r = rate(n)
        if r == 0:
            return None
        unit = [k / k.norm() for k in keys[prefix:]]
        order = list(range(n))
        protected: list[int] = []
        if energy is None:
            first = [j for j in order if (j + prefix) % 2 == 0]
            second = [j for j in order if (j + prefix) % 2 == 1]
        else:
            high = energy(index, unit)
            order.sort(key=lambda j: -high[j])
            if not whole(index):
                order, protected = order[: 2 * r], order[2 * r :]
            first, second = order[::2], order[1::2]
        edges = []
        for at, a in enumerate(first):
            best = max(range(len(second)), key=lambda b: float(unit[a] @ unit[second[b]]))
            edges.append((float(unit[a] @ unit[second[best]]), at, best))
        merged = {at: b for _, at, b in sorted(edges, key=lambda e: -e[0])[:r]}
        total = [size[prefix + b] * x[prefix + b] for b in second]
        grown = [size[prefix + b] for b in second]
        for at, b in merged.items():
            a = prefix + first[at]
            total[b] = total[b] + size[a] * x[a]
            grown[b] += size[a]
        stay = protected + [a for at, a in enumerate(first) if at not in merged]
        place = {a: i for i, a in enumerate(stay)}
        place |= {b: len(stay) + i for i, b in enumerate(second)}
        place |= {first[at]: len(stay) + b for at, b in merged.items()}
        rows = [*x[:prefix], *(x[prefix + a] for a in stay)]
        rows += [t / g for t, g in zip(total, grown, strict=True)]
        sizes = size[:prefix] + [size[prefix + a] for a in stay] + grown
        return torch.stack(rows), sizes, place

    return reduce


def pitome_energy(depth: int) -> Any:
    def energy(index: int, unit: list[Tensor]) -> list[float]:
        margin = 0.75 - 0.75 * index / depth
        high = []
        for a in unit:
            gaps = [float(a @ b) - margin for b in unit]
            high.append(sum(g if g > 0 else math.exp(g) - 1 for g in gaps) / len(unit))
        return high

    return energy


HOSTS = {
    "cls": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "none": {"class_token": False, "global_pool": "avg"},
}


def sharp(host: str) -> Any:
    """Three blocks; their token sequence is compared before the last norm."""
    return tiny_vit(depth=3, **HOSTS[host])


def compare(model: Any, live: Any, oracle: PlainViT, reduce: Any) -> None:
    x, seen = tiny_images(), []
    hook = model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    model(x)
    hook.remove()
    source, prefix = live.source(), oracle.prefix
    for i in range(len(x)):
        rows, place, _ = oracle.run(x[i], reduce)
        torch.testing.assert_close(seen[0][i], rows, rtol=2e-4, atol=2e-4)
        expected = [*range(prefix), *(p + prefix if p >= 0 else -1 for p in place)]
        assert source[i].tolist() == expected


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("host", ["cls", "registers"])
@torch.no_grad()
def test_evit_by_loops(host: str, fuse: bool) -> None:
    model = sharp(host)
    oracle = PlainViT(model)
    with sparsiattn.patch(model, "token_drop", keep=0.6, layers=[0, 1], fuse=fuse) as live:
        compare(model, live, oracle, evit(0.6, [0, 1], fuse, oracle.prefix, classes=1))


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_tome_by_loops(host: str, proportional: bool) -> None:
    model = sharp(host)
    oracle = PlainViT(model, proportional)
    options: dict[str, Any] = {"r": 14, "proportional": proportional, "restore": None}
    with sparsiattn.patch(model, "token_merge", **options) as live:
        compare(model, live, oracle, tome(lambda n: min(14, n // 2), oracle.prefix))


@pytest.mark.parametrize("bsm", ["first", "last", None])
@pytest.mark.parametrize("host", ["cls", "none"])
@torch.no_grad()
def test_pitome_by_loops(host: str, bsm: str | None) -> None:
    model = sharp(host)
    oracle = PlainViT(model)
    whole = {"first": lambda i: i < 2, "last": lambda i: i >= 2, None: lambda i: False}[bsm]
    reduce = tome(lambda n: math.floor(n - n * 0.8), oracle.prefix, pitome_energy(3), whole)
    options = {"ratio": 0.8, "bsm": bsm, "proportional": False, "restore": None}
    with sparsiattn.patch(model, "token_merge", method="pitome", **options) as live:
        compare(model, live, oracle, reduce)


@torch.no_grad()
def test_a_merged_token_attends_like_its_copies() -> None:
    """Keys of size s weigh like s equal keys: in block 1, against plain attention over copies."""
    model, x, seen = tiny_vit(depth=2), tiny_images(), []
    block: Any = model.get_submodule("blocks.1")
    hooks = [block.attn.register_forward_hook(lambda _, a, out: seen.extend([a[0], out]))]
    with sparsiattn.patch(model, "token_merge", r=20, layers=[0]) as live:
        model(x)
        source = live.source()
    hooks[0].remove()
    for i in range(len(x)):
        tokens, out = seen[0][i], seen[1][i]
        assert len(tokens) == 45
        assert len(source[i].unique()) == 45
        attn = block.attn
        q, k, v = attn.qkv(tokens).reshape(45, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        copies = F.scaled_dot_product_attention(q, k[:, source[i]], v[:, source[i]])
        by_hand = attn.proj(copies.transpose(0, 1).reshape(45, -1))
        torch.testing.assert_close(out, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("restore", ["unfold", "scatter"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token_drop", {"keep": 0.5, "layers": [0, 1]}),
        ("token_drop", {"keep": 0.5, "layers": [0, 1], "fuse": True}),
        ("token_merge", {"r": 15}),
    ],
)
@torch.no_grad()
def test_restored_positions_by_loops(name: str, options: dict[str, Any], restore: str) -> None:
    """unfold: the token that source() names; scatter: only tokens that stand for themselves."""
    model: Any = tiny_vit(depth=3)
    x, finals = tiny_images(2), []
    with sparsiattn.patch(model, name, restore=restore, **options):
        whole = model.blocks(model._pos_embed(model.patch_embed(x)))
    hook = model.blocks[-1].register_forward_hook(lambda _, __, out: finals.append(out))
    with sparsiattn.patch(model, name, restore=None, **options) as live:
        model(x)
        source = live.source()
    hook.remove()
    compared = 0
    for i in range(2):
        for j, at in enumerate(source[i].tolist()):
            alone = int((source[i] == at).sum()) == 1
            if at >= 0 and (restore == "unfold" or alone):
                torch.testing.assert_close(whole[i, j], finals[0][i, at])
                compared += 1
    assert compared >= 8
    assert whole.isfinite().all()
    assert (whole.abs().sum(-1) > 0).all(), "what is gone keeps its last value"


@pytest.mark.parametrize("options", [{"r": 15}, {"method": "pitome", "ratio": 0.7}])
@torch.no_grad()
def test_average_pooling_weighs_merged_tokens_by_size(options: dict[str, Any]) -> None:
    model: Any = tiny_vit(depth=3, global_pool="avg")
    x, seen = tiny_images(), []
    hook = model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with sparsiattn.patch(model, "token_merge", restore=None, **options) as live:
        model(x)
        source = live.source()
    hook.remove()
    size = torch.stack([(source == at).sum(1) for at in range(seen[0].shape[1])], dim=1)[:, 1:]
    assert int(size.max()) > 1
    pooled = (model.norm(seen[0][:, 1:]) * size[..., None]).sum(1) / 64
    with sparsiattn.patch(model, "token_merge", **options):
        torch.testing.assert_close(
            model(x), model.head(model.fc_norm(pooled)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("rule", [{"mass": 0.5}, {"mass": 0.95}, {"threshold": 1.0}, {}])
def test_adaptive_rules_by_numpy(rule: dict[str, float]) -> None:
    scores = torch.rand(6, 50, generator=torch.Generator().manual_seed(3)) ** 4 + 1e-4
    mask = TokenDrop(keep="adaptive", **rule).enough(scores).numpy()
    for row, kept in zip(scores.double().numpy(), mask, strict=True):
        share = row / row.sum()
        if "threshold" in rule:
            expected = share >= rule["threshold"] / len(row)
        else:
            order = np.argsort(-share)
            count = 1 + int(np.searchsorted(np.cumsum(share[order]), rule.get("mass", 0.9)))
            expected = np.isin(np.arange(len(row)), order[:count])
        assert (kept == expected).all()
    assert len(set(mask.sum(1))) > 1


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("rule", [{"mass": 0.5}, {"threshold": 1.2}])
@pytest.mark.parametrize("family", ["vit", "vit_registers", "vit_map_pool", "beit", "vit_parallel"])
@torch.no_grad()
def test_packed_images_equal_each_alone(family: str, rule: dict[str, float], fuse: bool) -> None:
    model = zoo.build(family)
    for module in model.modules():
        for name in ("qkv", "in_proj"):  # attention so sharp that images differ in their needs
            if isinstance(getattr(module, name, None), nn.Linear):
                getattr(module, name).weight *= 6
    x = zoo.images(model, batch=4)
    options = {"keep": "adaptive", "fuse": fuse, "layers": [0], **rule}
    with sparsiattn.patch(model, "token_drop", **options) as live:
        together, source = model(x), live.source()
        counts = [len(row[row >= 0].unique()) for row in source]
        alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
        features = model.forward_features(x)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(set(counts)) > 1, "images must differ in their counts"
    assert features.shape[1] == source.shape[1]


@pytest.mark.parametrize("kernel", [Reference(), MaskedSDPA()], ids=lambda k: k.name)
def test_kernels_keep_packed_images_apart(kernel: Any) -> None:
    inputs = random_inputs((1, 12), batch=1, prefix=0)
    pattern = Lengths(12, 12, (5, 1, 6))
    assert kernel.why_not(inputs, pattern) == []
    parts = [(0, 5), (5, 6), (6, 12)]
    apart = [
        F.scaled_dot_product_attention(*(t[..., a:b, :] for t in (inputs.q, inputs.k, inputs.v)))
        for a, b in parts
    ]
    torch.testing.assert_close(kernel(inputs, pattern), torch.cat(apart, dim=-2))
    assert pattern.pairs() == 25 + 1 + 36
    assert {"xformers", "varlen"} <= set(list_kernels())


@pytest.mark.parametrize("family", ["swin", "samvit", "hiera"])
@torch.no_grad()
def test_hierarchies_spare_the_mlp_of_the_worst_tokens(family: str) -> None:
    """Dropped tokens keep x + attention; kept ones, of larger norm, get the MLP's result too."""
    model: Any = zoo.build(family)
    x, seen = zoo.images(model), {}
    block = model.layers[0].blocks[0] if family == "swin" else model.blocks[0]
    hooks = [
        block.norm2.register_forward_pre_hook(lambda _, a: seen.setdefault("x", a[0])),
        block.register_forward_hook(lambda _, __, out: seen.update(out=out)),
    ]
    model(x)
    hooks[0].remove()
    before, dense = (seen[k].flatten(1, -2) for k in ("x", "out"))
    with sparsiattn.patch(model, "token_drop", score="norm", keep=0.5, layers=[0]):
        model(x)
    hooks[1].remove()
    out = seen["out"].flatten(1, -2)
    n = before.shape[1]
    for i in range(len(x)):
        kept = set(before[i].norm(dim=-1).topk(math.ceil(n / 2)).indices.tolist())
        for j in range(n):
            expected = dense[i, j] if j in kept else before[i, j]
            torch.testing.assert_close(out[i, j], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adaptive_counts_hold_in_lists_and_functions() -> None:
    """Each image by its own scores, or an error: never by those of the first image."""
    x, keep = tiny_images(), lambda site: "adaptive"
    model = tiny_vit(depth=2)
    try:
        live = sparsiattn.patch(model, "token_drop", keep=keep, layers=[0])
    except sparsiattn.SparsiattnError:
        return
    model(x)
    kept = live.source() >= 0
    assert not torch.equal(kept[0], kept[1])
