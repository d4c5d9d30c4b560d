"""Token methods by sampling and by soft merging, against naive forms of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsiattn import InvalidOption, InvalidType, Reduction, TokenInputs, patch, search, train
from sparsiattn.methods._soft import SoftPlanner
from sparsiattn.methods.ats import ATS, sampled
from sparsiattn.methods.diffrate import DiffRate
from sparsiattn.methods.patch_merger import Merger, PatchMerger
from sparsiattn.methods.sinkhorn import Sinkhorn, Transport
from sparsiattn.methods.sit import SiT, Slimming
from sparsiattn.testing import TokenStrategySuite, random_inputs, tiny_images, tiny_vit
from tests.support.training_help import batches, one_stage, patched


class TestDiffRate(TokenStrategySuite):
    strategy = DiffRate(keep=0.6)


def naive_diffrate(
    x: list[list[float]], seen: list[float], alike: list[list[float]], keep: int, dropped: int
) -> tuple[list[list[float]], list[int]]:
    """Tokens and sizes after one step on one image, token by token."""
    order = sorted(range(len(x)), key=lambda i: -seen[i])
    stay, moved = sorted(order[:keep]), order[keep : len(x) - dropped]
    sums, sizes = {i: list(x[i]) for i in stay}, dict.fromkeys(stay, 1)
    for i in moved:
        best = max(stay, key=lambda j: alike[i][j])
        sums[best] = [a + b for a, b in zip(sums[best], x[i], strict=True)]
        sizes[best] += 1
    return [[v / sizes[i] for v in sums[i]] for i in stay], [sizes[i] for i in stay]


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_diffrate_drops_the_least_attended_and_merges_the_next(drop: float) -> None:
    inputs = random_inputs((4, 4), prefix=1)
    x = torch.randn(2, 16, 6)
    tokens = TokenInputs(x, inputs.site, inputs, layer=0, depth=2, class_tokens=1)
    found = DiffRate(keep=6, drop=drop).reduce(tokens)
    assert found is not None
    rows = (inputs.scale * inputs.q[:, :, :1] @ inputs.k.mT).softmax(-1)[..., 0, 1:].mean(1)
    mean = inputs.k.mean(1)[:, 1:]
    for image in range(2):
        alike = torch.nn.functional.cosine_similarity(mean[image][:, None], mean[image], dim=-1)
        wanted = naive_diffrate(
            x[image].tolist(), rows[image].tolist(), alike.tolist(), 6, round(drop * 10)
        )
        torch.testing.assert_close(found.values[image], torch.tensor(wanted[0]))  # type: ignore[index]
        assert found.size[image].tolist() == wanted[1]  # type: ignore[index]
        assert int((found.assign[image] < 0).sum()) == round(drop * 10)  # type: ignore[index]


def test_search_finds_rates_per_block_for_diffrate() -> None:
    model, images = tiny_vit(depth=3), tiny_images(6)
    found = search(model, images, {"macs": 0.85}, strategy="diffrate", trials=3)
    assert found.found.macs <= 0.85 * found.macs_dense
    with patch(model, "diffrate", schedule=found.schedule) as live:
        assert live.report().macs == found.found.macs


@pytest.mark.parametrize("options", [{"drop": 1.5}, {"drop": "half"}, {"drop": [0.5, -1]}])
def test_diffrate_refuses_what_is_no_share(options: dict[str, object]) -> None:
    with pytest.raises((InvalidOption, InvalidType), match="drop must be a number from 0 to 1"):
        DiffRate(**options)  # type: ignore[arg-type]


SOFT = (SiT, PatchMerger, Sinkhorn)


class TestATS(TokenStrategySuite):
    strategy = ATS(keep=0.6)


@pytest.mark.slow
class TestATSStatic(TokenStrategySuite):
    strategy = ATS(keep=0.6, static=True)


@pytest.mark.slow
class TestSiT(TokenStrategySuite):
    strategy = SiT(keep=0.6)


@pytest.mark.slow
class TestPatchMerger(TokenStrategySuite):
    strategy = PatchMerger(keep=0.6)


class TestSinkhorn(TokenStrategySuite):
    strategy = Sinkhorn(keep=0.6)


def naive_sampled(scores: list[float], count: int) -> set[int]:
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    hit, total, sums = set(), 0.0, []
    for i in order:
        total += scores[i]
        sums.append(total)
    for j in range(1, count + 1):
        level = (2 * j - 1) / (2 * count)
        hit.add(order[min(range(len(sums)), key=lambda i: abs(sums[i] - level))])
    return hit


@pytest.mark.parametrize("count", [1, 5, 12])
def test_ats_samples_as_the_naive_loop(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    scores = (3 * torch.randn(3, 12, generator=draw)).softmax(1)
    mask = sampled(scores, count)
    for row, mine in zip(scores.tolist(), mask, strict=True):
        assert set(mine.nonzero().flatten().tolist()) == naive_sampled(row, count)
        assert 1 <= int(mine.sum()) <= count


def test_ats_static_keeps_exactly_its_budget_and_all_when_full() -> None:
    model, x = tiny_vit(depth=4), tiny_images()
    with torch.no_grad():
        dense = model(x)
        with patch(model, ATS(keep=1.0, static=True)):
            torch.testing.assert_close(model(x), dense)
        with patch(model, ATS(keep=20, static=True, layers=[1])) as live:
            model(x)
            place = live.source()[:, 1:]
    assert all(int((row >= 0).sum()) == 20 for row in place)


def naive_softmax(row: list[float]) -> list[float]:
    top = [math.exp(value - max(row)) for value in row]
    return [value / sum(top) for value in top]


def tokens(n: int = 6, width: int = 8) -> Tensor:
    return torch.randn(2, n, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_slimming_is_a_softmax_over_tokens() -> None:
    x, module = tokens(), Slimming(3, 8, 4, "blocks.1.attn")
    weights = module.weights(x)
    norm, first, _, second = module.score
    for b in range(2):
        hidden = [torch.nn.functional.gelu(first.weight @ norm(t) + first.bias) for t in x[b]]
        for m in range(3):
            row = [float((second.weight[m] @ h + second.bias[m]).detach()) for h in hidden]
            torch.testing.assert_close(weights[b, m], torch.tensor(naive_softmax(row)))


def test_patch_merger_is_attention_of_its_queries() -> None:
    x, module = tokens(), Merger(3, 8, "blocks.1.attn")
    weights = module.weights(x)
    for b in range(2):
        for m, query in enumerate(module.queries):
            row = [float(query.detach() @ module.norm(t).detach()) / math.sqrt(8) for t in x[b]]
            torch.testing.assert_close(weights[b, m], torch.tensor(naive_softmax(row)))


def test_sinkhorn_is_alternate_scaling_of_the_kernel() -> None:
    x, module = tokens(), Transport(3, 8, "blocks.1.attn", epsilon=0.5, iterations=3)
    weights = module.weights(x)
    for b in range(2):
        plan = [
            [math.exp(float(torch.cosine_similarity(c, t, dim=0).detach()) / 0.5) for t in x[b]]
            for c in module.centres
        ]
        for _ in range(3):
            plan = [[value / sum(row) for value in row] for row in plan]
            shares = [sum(row[n] for row in plan) for n in range(6)]
            plan = [[value / shares[n] for n, value in enumerate(row)] for row in plan]
        means = [[value / sum(row) for value in row] for row in plan]
        torch.testing.assert_close(weights[b], torch.tensor(means))


@pytest.mark.parametrize("module", [
    Slimming(3, 8, 4, "a"), Merger(3, 8, "a"), Transport(3, 8, "a", 1.0, 3),
])  # fmt: skip
def test_every_weight_of_a_merger_gets_a_gradient(module: SoftPlanner) -> None:
    x = tokens()
    (module.weights(x) @ x).square().sum().backward()
    for name, weight in module.named_parameters():
        assert weight.grad is not None, name
        if name != "score.3.bias":  # adds the same to every token's score, so softmax drops it
            assert weight.grad.abs().max() > 0, name


def test_mixed_tokens_unfold_by_transposed_weights() -> None:
    weights = torch.tensor([[[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]])
    x = tokens(3)[:1]
    mixed = Reduction.mix(x, weights)
    assert mixed.values is not None
    torch.testing.assert_close(mixed.values, weights @ x)
    expected = torch.tensor([[[1.0, 0.0], [1 / 3, 2 / 3], [0.0, 1.0]]])
    assert mixed.unfold is not None
    torch.testing.assert_close(mixed.unfold(torch.eye(2)[None]), expected)
    with pytest.raises(InvalidType, match="one row for each new token"):
        Reduction.mix(x, weights.mT)


@pytest.mark.parametrize("kind", SOFT)
def test_counts_multiply_from_layer_to_layer(kind: type[SiT | PatchMerger | Sinkhorn]) -> None:
    model, x = tiny_vit(depth=4), tiny_images()
    schedule = {"keep": {"1": 0.5, "2": 0.5, "3": 7}}
    seen: list[int] = []
    with torch.no_grad(), patch(model, kind(), schedule=schedule):
        for block in model.blocks:
            block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        model(x)
    assert seen == [65, 33, 17, 8]


def test_training_moves_the_weights_of_a_merger() -> None:
    model = patched("sit", keep=0.5, layers=[1])
    before = {n: w.clone() for n, w in model.named_parameters() if ".sparsiattn." in n}
    assert before
    train(model, batches(2), recipe=one_stage(trainable="planners", lr=1e-2))
    after = dict(model.named_parameters())
    still = [name for name, weight in before.items() if torch.equal(weight, after[name])]
    assert not [name for name in still if not name.endswith("score.3.bias")]
