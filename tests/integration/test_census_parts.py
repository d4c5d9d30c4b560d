"""What the census is made of: finding softmaxes, cutting models short, going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import census, small, zoo
from tests.support.softmaxes import attention_of


def _heads(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, 2, 4).transpose(1, 2)


class Attention(nn.Module):
    """Eight channels in two heads, with scores as ``weigh`` makes them."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.attend = nn.Linear(8, 24), nn.Linear(8, 8), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(_heads, self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


def _written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.5) @ k.transpose(-2, -1) + 1.0).softmax(dim=-1).to(v.dtype) @ v


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    return torch.einsum("bhij,bhjd->bhid", F.softmax(scores, dim=-1), v)


def _talking(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.ones(2, 2)).permute(0, 3, 1, 2)
    return F.dropout(mixed.softmax(-1), 0.0) @ v


def _gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return k.softmax(-2) * (q.softmax(-1) @ v.mT @ v)


@pytest.mark.parametrize(
    ("attend", "kind"),
    [
        (F.scaled_dot_product_attention, "sdpa"),
        (_written, "written"),
        (_einsum, "written"),
        (_talking, "written"),
        (_gate, "other"),
    ],
)
def test_softmaxes_are_told_apart(attend: Callable[..., Tensor], kind: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8), Attention(attend), Attention(attend))
    found = attention_of(model, lambda: model(torch.randn(1, 5, 8)))
    assert [(f.module, f.owner, f.kind) for f in found] == [
        ("1", "Attention", kind), ("2", "Attention", kind),
    ]  # fmt: skip
    assert all(f.between_tokens == (kind != "other") for f in found)
    assert kind == "other" or all(f.pairs == 2 * 5 * 5 for f in found)


def test_a_model_without_softmax_has_no_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert attention_of(model, lambda: model(torch.randn(2, 8)).softmax(-1)) == []


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [("aaaa", "aa"), ("aabaabaab", "aab"), ("abababab", "ab"), ("aaabbb", "aabb"), ("abc", "abc")],
)
def test_repeated_blocks_are_cut(blocks: str, kept: str) -> None:
    width = {"a": 2, "b": 3, "c": 4}
    model = nn.Sequential(*[nn.Linear(width[b], width[b]) for b in blocks])
    before = small.shorten(model)
    assert [layer.in_features for layer in model] == [width[b] for b in kept]
    small.restore(before)
    assert [layer.in_features for layer in model] == [width[b] for b in blocks]


def test_light_models_have_their_buffers_and_then_values() -> None:
    model = small.build_light(zoo.FAMILIES["beit"])
    assert all(p.is_meta for p in model.parameters())
    table = model.blocks[0].attn.relative_position_index
    assert torch.equal(table, zoo.FAMILIES["beit"]().blocks[0].attn.relative_position_index)
    out = small.materialise(model)(torch.randn(1, 3, 32, 32))
    assert out.isfinite().all()
    assert out.std() > 1e-3


def test_a_row_tells_what_became_of_a_model() -> None:
    entry = census.Entry("vit", "vit", zoo.FAMILIES["vit"], (1, 3, 32, 32))
    row = census.row_of(entry, values=True)
    assert (row["status"], row["faults"], row["missed"]) == ("patched", [], [])
    assert row["change"]["everything"] <= 1e-5 < row["change"]["topk k=.25"]
    plain = census.Entry("conv", "conv", lambda: nn.Conv2d(3, 4, 1), (1, 3, 8, 8))
    assert census.row_of(plain, values=True)["status"] == "none"
    broken = census.Entry("broken", "broken", lambda: nn.Linear(1), (1, 3, 8, 8))  # type: ignore[call-arg]
    assert "TypeError" in census.row_of(broken, values=True)["faults"][0]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"name": "killer", "status": "failed", "faults": ["killed"]}) + "\n")

    def never() -> nn.Module:
        raise AssertionError("a model that killed the run is not tried again")

    plain = census.Entry("conv", "conv", lambda: nn.Conv2d(3, 4, 1), (1, 3, 8, 8))
    census.run(iter([census.Entry("killer", "x", never), plain]), path)
    assert {name: row["status"] for name, row in census.read(path).items()} == {
        "killer": "failed", "conv": "none",
    }  # fmt: skip
