"""How `gather` cuts its tiles into chunks on a GPU, seen on tensors that only claim to be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsiattn import AttentionInputs, Pattern, Site
from sparsiattn.kernels import Gather, gather_ops
from sparsiattn.strategies import finish

CUDA = torch.device("cuda")


@pytest.mark.parametrize("keys", [4, 16])
def test_no_call_has_more_batches_than_a_grid(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's flash attention launches a program for each batch along an axis of limited length."""
    batches, attention = [], gather_ops.differentiable_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batches.append(len(q))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(gather_ops, "differentiable_attention", counted)
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(6, 4, 128 * 128, 16, device=CUDA, dtype=torch.bfloat16)
        site = Site.of(q, q, q, prefix_tokens=0, grid=(128, 128))
        inputs = AttentionInputs(q, q, q, 0.25, None, site, tile=(2, 2))
        scores = torch.empty(1, 1, 4096, 128 * 128, device=CUDA)
        pattern = finish(Pattern.top(scores, keys), inputs)
        out = Gather()(inputs, pattern)
    assert out.shape == q.shape
    assert sum(batches) == 6 * 4 * 4096
    assert max(batches) <= 65_535
    assert len(batches) <= 3, "chunks should still be few"
    assert len(set(batches)) == 1, "each further shape would be planned anew"


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 24, 25, 97, 6 * 4 * 4096])
@pytest.mark.parametrize("most", [1, 8, 65_535])
def test_chunks_are_equal_where_a_few_more_can_be(count: int, most: int) -> None:
    step = gather_ops._even_step(count, most)
    assert 1 <= step <= most
    fewest = -(-count // most)
    assert -(-count // step) <= 2 * max(1, fewest)
    divides = [n for n in range(fewest, 2 * fewest + 1) if n and count % n == 0]
    if fewest > 1 and divides:
        assert count % step == 0
        assert count // step == divides[0]


def test_chunks_of_a_cpu_fit_its_cache() -> None:
    assert gather_ops.tiles_at_once(torch.device("cpu"), 1 << 30) == torch.get_num_threads()
    assert gather_ops.tiles_at_once(CUDA, 1 << 30) == 1
