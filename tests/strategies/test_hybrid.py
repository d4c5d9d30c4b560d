"""`Hybrid`: two strategies that know of each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.serialization.files import with_checksum
from sparsiattn.strategies import TokenStrategy
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.testing.hosts import tiny_images, tiny_vit

TOKEN_STRATEGIES = [
    name
    for name in sparsiattn.list_strategies()
    if issubclass(REGISTRY.get("strategies", name), TokenStrategy)
]


@pytest.mark.parametrize("tokens", TOKEN_STRATEGIES)
def test_merged_tokens_share_no_keys_unless_asked_to(tokens: str) -> None:
    """Tiles are runs of the sequence, which holds merged tokens in no order of places."""
    merges = REGISTRY.get("strategies", tokens)().merges()
    assert Hybrid(tokens=tokens).tile == (1 if merges else "auto")
    assert Hybrid(tokens=tokens, tile=(2, 2)).attention.tile == (2, 2)


@pytest.mark.parametrize("saved", [{}, {"auto": {"tile": [2, 2]}}])
def test_what_auto_was_when_it_was_saved_stays(tmp_path: Path, saved: dict[str, Any]) -> None:
    model, images = tiny_vit(), tiny_images()
    options = {"attention": "topk", "tokens": "token_merge", "k": 0.5, "only_if_faster": False}
    with sparsiattn.patch(model, "hybrid", **options) as patch, torch.no_grad():
        new = model(images)
        patch.save(tmp_path)
    config = next(tmp_path.glob("*.json"))
    content = json.loads(config.read_text())
    content["strategy"]["options"]["attention"]["options"]["tile"] = "auto"
    content["strategy"]["options"]["tile"] = "auto"
    for site in content["sites"].values():
        site.update(saved)
    config.write_text(json.dumps(with_checksum(content)))
    with sparsiattn.load(model, tmp_path) as patch, torch.no_grad():
        assert patch.strategy.attention.tile == ((2, 2) if saved else 1)
        assert torch.equal(model(images), new) is not bool(saved)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "hybrid"),
        ({"k": 0.1, "keep": 0.5}, "hybrid(k=0.1, keep=0.5)"),
        ({"tokens": "token_merge"}, "hybrid(tokens=token_merge, tile=1)"),
        ({"background": None, "layers": [1]}, "hybrid(layers=(1,), background=None)"),
    ],
)
def test_the_repr_of_a_patch_shows_the_options_that_were_set(
    options: dict[str, Any], text: str
) -> None:
    assert Hybrid(**options).call_text() == text
    with sparsiattn.patch(tiny_vit(), "hybrid", **options) as patch:
        assert repr(patch).startswith(f"<Patch: {text} on 2 sites of VisionTransformer")
