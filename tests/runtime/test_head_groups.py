"""Large key lists are made for a few heads at a time, which changes nothing but memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn.runtime import head_groups
from sparsiattn.testing import tiny_images, tiny_vit

LINES: list[dict[str, Any]] = [
    {"strategy": "connectivity", "k": 0.4, "tile": (4, 4), "background": 2},
    {"strategy": "connectivity", "k": 0.4, "tile": (2, 2), "background": None},
    {"strategy": "topk", "k": 0.4, "tile": (4, 2)},
]


@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("most", [1, 200])
def test_groups_give_what_all_heads_give(
    line: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = tiny_vit(depth=2), tiny_images(2)
    heads = []
    with torch.no_grad(), sparsiattn.patch(model, **line) as patch:
        wanted = model(images)
        monkeypatch.setattr(head_groups, "MOST_ENTRIES", most)
        real = sparsiattn.runtime.site_runtime.finalize.finish

        def noted(pattern: Any, inputs: Any, **options: Any) -> Any:
            heads.append(inputs.q.shape[1])
            return real(pattern, inputs, **options)

        monkeypatch.setattr(sparsiattn.runtime.site_runtime.finalize, "finish", noted)
        found = model(images)
        assert max(heads) < patch.sites[0].heads
        assert sum(heads) == sum(site.heads for site in patch.sites)
    torch.testing.assert_close(found, wanted)


def test_a_planner_that_compares_heads_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_groups, "MOST_ENTRIES", 1)
    model, images = tiny_vit(depth=1), tiny_images(1)
    seen: list[int] = []

    class Comparing(sparsiattn.Strategy):
        """Keys that all heads together score highest."""

        name = "comparing"

        def plan(self, inputs: sparsiattn.AttentionInputs) -> sparsiattn.Pattern:
            seen.append(inputs.q.shape[1])
            scores = (inputs.q @ inputs.k.mT).mean(1, keepdim=True)
            return sparsiattn.Pattern.top(scores, 20)

    with torch.no_grad(), sparsiattn.patch(model, Comparing(tile=(2, 2))) as patch:
        seen.clear()  # of the dry run
        model(images)
        assert seen == [patch.sites[0].heads]
