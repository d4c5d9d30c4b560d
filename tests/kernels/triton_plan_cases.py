"""What `test_triton.py` runs in a process of its own: the kernels that plan, interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn.attention import KeyIndex
from sparsiattn.attention.background import Summary, key_cells
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.kernels import Reference, Triton, triton_plan
from sparsiattn.kernels._triton import plan_ops
from sparsiattn.kernels.native import lists as native_lists
from sparsiattn.kernels.native import scores as native
from sparsiattn.strategies import finish
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support.voting import VotingCase, assert_largest_votes

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_triton.py runs this"
)
HALF = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


CASES = {
    "even tiles": VotingCase(),
    "two images, no prefix": VotingCase(batch=2, prefix=0, k=9),
    "uneven tiles": VotingCase((7, 5), (3, 4), k=11, prefix=3),
    "a single row of tokens": VotingCase((1, 37), (2, 4), k=7),
    "one key beside the prefix": VotingCase(k=2),
    "all keys but one": VotingCase((4, 4), (2, 2), k=16),
    "more voters than a program's rows": VotingCase((16, 16), (16, 16), k=30, heads=1),
    "more keys than a step, wide heads": VotingCase((12, 12), (6, 6), k=40, dim=72, heads=1),
    "no summary": VotingCase(background=None),
    "float16": VotingCase(dtype=torch.float16),
    "bfloat16": VotingCase((8, 6), dtype=torch.bfloat16, dim=80, heads=1),
}


LATER = ("two images, no prefix", "one key beside the prefix", "all keys but one", "float16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LATER)) for name in CASES]
)
def test_lists_hold_the_keys_of_the_largest_votes(name: str) -> None:
    case = CASES[name]
    pattern = case.pattern()
    assert_largest_votes(case, pattern, *case.lists(pattern))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_native")
@pytest.mark.parametrize("name", ["even tiles", "uneven tiles", "a single row of tokens"])
def test_the_same_keys_as_on_the_cpu(name: str) -> None:
    """Compiled code of the CPU and the kernels choose alike."""
    case = CASES[name]
    assert native.is_ready()
    pattern = case.pattern()
    inputs, tiles = pattern.inputs, pattern.inputs.tiles
    assert tiles is not None
    sizes = tiles.count, case.k, case.prefix, inputs.scale
    wanted = native_lists.voted_keys(inputs.q, inputs.k, *pattern.voter_tokens, *sizes)
    assert torch.equal(case.lists(pattern)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_of_equal_votes_the_first_keys_are_taken(dtype: torch.dtype) -> None:
    case = VotingCase((6, 6), (3, 3), k=9, prefix=2, dtype=dtype)
    pattern = case.pattern()
    keys = torch.zeros_like(pattern.inputs.k)
    same = TopLogits.of(pattern.inputs.replace(k=keys), case.k)
    index, _ = case.lists(same)
    assert torch.equal(index, torch.arange(case.k).expand_as(index))
    # of every three equal keys, those that are better than the rest
    keys = pattern.inputs.k[..., :13, :].repeat_interleave(3, dim=-2)[..., :38, :]
    repeated = TopLogits.of(pattern.inputs.replace(k=keys.contiguous()), case.k)
    index, _ = case.lists(repeated)
    for row in index.flatten(0, -2).tolist():
        kept = [key for key in row if key >= case.prefix]
        for key in kept:
            earlier = range(max(case.prefix, key // 3 * 3), key)
            assert all(other in kept for other in earlier), row


def test_few_votes_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and heads are voted for in parts, and the lists are the same."""
    case = VotingCase((4, 4), (2, 2), k=5, batch=3, heads=3)
    pattern = case.pattern()
    wanted, wanted_bias = case.lists(pattern)
    for most in (1, 4 * 32 * 2, 4 * 32 * 6):
        monkeypatch.setattr(plan_ops, "MOST_VOTES", most)
        index, bias = case.lists(pattern)
        assert torch.equal(index, wanted)
        assert bias is not None
        assert torch.equal(bias, wanted_bias)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("grid", "parts", "prefix", "dims"),
    [((8, 8), (2, 2), 1, (16, 16)), ((7, 5), (3, 2), 0, (72, 24)), ((1, 9), (1, 4), 3, (80, 80))],
)
def test_pooled_keys_are_means_of_cells(
    grid: tuple[int, int],
    parts: tuple[int, int],
    prefix: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    summary = of_cells(grid, parts, prefix)
    k, v = keys_and_values(len(summary.cells), dims, dtype)
    for mine, x in zip(triton_plan.pooled(summary, k, v), (k, v), strict=True):
        assert mine.dtype == dtype
        wanted = summary.pool(x.double())
        torch.testing.assert_close(mine, wanted.to(dtype), rtol=1e-2 if dtype in HALF else 1e-5,
                                   atol=1e-5)  # fmt: skip


def of_cells(
    grid: tuple[int, int], parts: tuple[int, int], prefix: int, allowed: Tensor | None = None
) -> Summary:
    cells = key_cells(grid, parts, prefix, device=CPU)
    bias = torch.zeros(1, 1, 1, parts[0] * parts[1])
    return Summary(cells, parts, bias, allowed, source=(grid, prefix))


def keys_and_values(n: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slices of packed rows, as hosts have them."""
    packed = torch.randn(2, n, 3, sum(dims), generator=torch.Generator().manual_seed(0))
    k, v = packed.to(dtype).transpose(1, 2).split(dims, -1)
    return k, v


def test_gradients_of_pooled_keys() -> None:
    """With a key mask, too; a cell without any allowed key is zero, and so is its gradient."""
    masks = torch.rand(2, 1, 1, 21, generator=torch.Generator().manual_seed(1)) > 0.4
    masks[1, ..., of_cells((4, 5), (2, 2), 1).cells == 2] = False
    for allowed in (None, masks, masks[:1].expand(1, 3, 1, 21)):
        summary = of_cells((4, 5), (2, 2), 1, allowed)
        k, v = (x.requires_grad_() for x in keys_and_values(21, (8, 24), torch.float32))
        found = triton_plan.pooled(summary, k, v)
        wanted = summary.pool(k), summary.pool(v)
        torch.testing.assert_close(found, wanted)
        grads = [
            torch.autograd.grad(sum(x.sin().sum() for x in means), (k, v))
            for means in (found, wanted)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own check
def test_the_operators_keep_torchs_contract() -> None:
    pattern = VotingCase((4, 4), (2, 2), k=5).pattern()
    inputs = pattern.inputs
    summary = of_cells((4, 4), (2, 2), 1)
    members = triton_plan.cell_members((4, 4), (2, 2), 1, device=CPU)
    k, v = inputs.k.clone().requires_grad_(), inputs.v.clone().requires_grad_()
    torch.library.opcheck(plan_ops.pool_cells, (k, v, summary.cells, *members, None))
    total = triton_plan.key_counts((4, 4), (2, 2), 1, device=CPU)
    lists = (inputs.q, inputs.k, *pattern.voter_tokens, 4, 5, 1, 0.25, summary.cells, total)
    torch.library.opcheck(plan_ops.voted_keys, lists)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner takes the CPU for a GPU, as the interpreter does."""

    def answer(device: torch.device) -> bool:
        return True

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    monkeypatch.setattr(triton_plan, "is_planned_on", answer)


@pytest.mark.parametrize("name", ["uneven tiles", "bfloat16"])
def test_a_site_planned_and_computed_in_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path of a GPU against the path of the CPU."""
    case = CASES[name]
    pattern = case.pattern()
    inputs = pattern.inputs
    wanted = finish(pattern, inputs, background=case.background)
    on_a_gpu(monkeypatch)
    planned = finish(pattern, inputs, background=case.background)
    assert isinstance(planned, KeyIndex)
    assert planned.summary is not None
    assert torch.equal(planned.index, planned.index.sort(dim=-1).values)
    if case.dtype == torch.float32:
        assert torch.equal(planned.to_mask(), wanted.to_mask())
    exact = inputs.replace(q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
    out = Triton()(inputs, planned)
    tolerance = 2e-2 if case.dtype in HALF else 1e-4
    torch.testing.assert_close(
        out.float(), Reference()(exact, planned), rtol=tolerance, atol=tolerance
    )


@pytest.mark.slow
def test_a_compiled_model_is_planned_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, with the results of the eager model and of torch's planning."""
    model, images = tiny_vit().eval(), tiny_images(1)
    options: dict[str, Any] = {"k": 0.3, "tile": (4, 4)}
    with torch.no_grad(), sparsiattn.patch(model, kernel="reference", **options):
        wanted = model(images)
    on_a_gpu(monkeypatch)
    with torch.no_grad(), sparsiattn.patch(model, kernel="triton", **options):
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            torch.testing.assert_close(run(images), wanted, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()
