"""What the native code does besides attention, on its way: ranking, counting; and who sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsiattn.attention import CountedSummary, KeyBlocks, Ranked
from sparsiattn.kernels import Reference
from sparsiattn.strategies import Connectivity, finish
from tests.support.native_calls import KERNEL, call, same


@pytest.mark.usefixtures("compiled_native")
@pytest.mark.parametrize(("grid", "prefix"), [((16, 16), 1), ((21, 30), 2)])
def test_the_best_come_with_the_scores(grid: tuple[int, int], prefix: int) -> None:
    inputs, _ = call(grid, (8, 8), 1, prefix=prefix, heads=3)
    inputs = inputs.replace(block=(2, 2))
    strategy = Connectivity(k=0.2, tile=(8, 8), block=(2, 2), scores="predictor")
    planner = strategy.planner(inputs.site)
    with torch.no_grad():
        wish = planner(inputs)
        assert isinstance(wish, Ranked)
        assert wish.best is not None
        pattern, plain = (finish(x, inputs, background=2) for x in (wish, replace(wish, best=None)))
    assert isinstance(pattern, KeyBlocks)
    assert isinstance(plain, KeyBlocks)
    assert torch.equal(pattern.chosen, plain.chosen)
    assert torch.equal(wish.scores, planner.scores(inputs))
    same(inputs, pattern)


@pytest.mark.usefixtures("compiled_native")
@pytest.mark.parametrize(("background", "counted"), [(2, True), (12, True), (13, False)])
def test_the_bias_is_counted_on_the_way(background: int, counted: bool) -> None:
    inputs, pattern = call((16, 16), (4, 4), (2, 2), background=background, k=0.6)
    assert isinstance(pattern, KeyBlocks)
    summary = pattern.summary
    assert isinstance(summary, CountedSummary) == counted
    assert summary is not None
    found = KERNEL(inputs, pattern)
    assert ("bias" in vars(summary)) != counted  # nobody asked
    picked = torch.nn.functional.one_hot(summary.cells[pattern.index], summary.count + 1).sum(-2)
    total = torch.bincount(summary.cells, minlength=summary.count + 1)
    torch.testing.assert_close(summary.bias, (total - picked)[..., :-1].float().log())
    # some lists hold a whole small cell
    assert summary.bias.isinf().any() == (background > 2)
    torch.testing.assert_close(found, Reference()(inputs, pattern), rtol=1e-4, atol=1e-5)
    other = replace(pattern, summary=replace(summary, bias=torch.randn_like(summary.bias)))
    assert not torch.allclose(KERNEL(inputs, other), found)
    same(inputs, other)


@pytest.mark.usefixtures("compiled_native")
def test_those_who_watch_see_the_operators() -> None:
    inputs, pattern = call((8, 8), (4, 4), (2, 2))
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    exact = KERNEL(inputs, pattern)
    with Watch():
        assert torch.equal(KERNEL(inputs, pattern), exact)
    assert "sparsiattn.native_attention.default" in seen
    with torch.profiler.profile() as profile:
        KERNEL(inputs, pattern)
    assert "sparsiattn::native_attention" in {event.key for event in profile.key_averages()}
