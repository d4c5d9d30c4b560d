"""Token strategies on hosts with more than a tower: only the tower of the image gets shorter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import sparsiattn
from tests.support.sequences import SequenceViT, drawn
from tests.support.tokens_by_hand import Drop, Merge, Shortened

OPTIONS: dict[str, dict[str, Any]] = {
    "token_drop": {"keep": 0.5, "score": "mean_query"},
    "token_merge": {"r": 4},
}
KEPT = "keeps every token: its tokens may not be patches: 1 x 5 patches (guess)"


class Detector(SequenceViT):
    """The five best patches become queries, which attend to each other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.score = nn.Linear(48, 1)
        self.decoder = nn.ModuleList(Block(48, 3) for _ in range(2))
        self.seen: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        x = self.sequence(image)
        for block in self.blocks:
            x = block(x)
        memory = self.norm(x)[:, 1:]
        best = self.score(memory)[..., 0].topk(5).indices
        queries = memory.gather(1, best[..., None].expand(-1, -1, 48))
        for block in self.decoder:
            queries = block(queries)
            self.seen.append(queries.shape[1])
        return self.head(queries)


def shuffled(x: Tensor) -> Tensor:
    """By the values of tokens: a run without data does not know their order."""
    return x.gather(1, x.argsort(dim=1))


class ShuffledDetector(Detector):
    def sequence(self, image: Tensor) -> Tensor:
        return shuffled(super().sequence(image))


class Shuffles(nn.Module):
    """Attention among tokens in another order than they came."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.attn(shuffled(x), **options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(model: Detector, strategy: str, x: Tensor) -> Tensor:
    reduce: Any = Drop(0.5, 0) if strategy == "token_drop" else Merge(4)
    return Shortened(model, list(model.blocks), 1, reduce)(x, whole=True)


@pytest.mark.parametrize("strategy", OPTIONS)
@torch.no_grad()
def test_queries_of_a_decoder_stay(strategy: str) -> None:
    model, x, options = drawn(Detector()), images(), OPTIONS[strategy]
    expected = by_hand(model, strategy, x)
    model.seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is done where it is a guess
        patch = sparsiattn.patch(model, strategy, layers=[0, 1, 2], input=(1, 3, 32, 32), **options)
    with patch:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        report = str(patch.report())
    assert model.seen == [5, 5]
    assert f"decoder.0 {KEPT}" in report
    assert f"decoder.1 {KEPT}" in report
    inspection = sparsiattn.inspect(model, (1, 3, 32, 32), strategies=[strategy])
    assert f"decoder.1 {KEPT}" in str(inspection)


def test_attention_strategies_beside_tokens_name_the_guess() -> None:
    model = drawn(Detector())
    with pytest.warns(sparsiattn.GuessedStructure, match=r"decoder\.0\.attn"):
        patch = sparsiattn.patch(model, "hybrid", only_if_faster=False, input=(1, 3, 32, 32))
    tiles = {row.name: row.tile for row in patch.report().sites}
    assert tiles["decoder.0.attn"] == 1
    assert KEPT in str(patch.report())


@torch.no_grad()
def test_a_tower_that_is_a_guess_is_refused_until_it_is_said() -> None:
    model, x = drawn(ShuffledDetector()), images()
    with pytest.raises(sparsiattn.InvalidOption, match=r"grid=\(rows, columns\), prefix="):
        sparsiattn.patch(model, "token_drop", input=x)
    expected = by_hand(model, "token_drop", x)
    options = {**OPTIONS["token_drop"], "layers": [0, 1, 2], "grid": (8, 8), "prefix": 1}
    with sparsiattn.patch(model, "token_drop", input=x, **options) as patch:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert f"decoder.0 {KEPT}" in str(patch.report())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_guess_within_a_tower_is_refused_by_name(which: int) -> None:
    model: Any = drawn(Detector())
    model.blocks[which].attn = Shuffles(model.blocks[which].attn)
    with pytest.raises(sparsiattn.InvalidOption, match=rf"blocks\.{which}\.attn.*grid="):
        sparsiattn.patch(model, "token_drop", input=images(1))
    assert sparsiattn.patch_of(model) is None
