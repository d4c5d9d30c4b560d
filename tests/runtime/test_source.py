"""Whose forward pass `Patch.source` speaks of."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import sparsiattn
from tests.support import zoo


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


@torch.no_grad()
def source_of(patch: sparsiattn.Patch, x: Tensor) -> Tensor:
    patch.model(x)
    return patch.source()


def in_another_thread(action: Any) -> Any:
    answers: list[Any] = []
    worker = threading.Thread(target=lambda: answers.append(action()))
    worker.start()
    worker.join()
    return answers[0]


def test_every_thread_asks_for_its_own() -> None:
    x, y = images(3), images(2)
    with sparsiattn.patch(zoo.build("vit"), "token_drop", keep=0.5) as patch:
        other = source_of(patch, y)
        mine = source_of(patch, x)

        def serve() -> Tensor:
            with pytest.raises(sparsiattn.InvalidOption, match="of this thread"):
                patch.source()
            return source_of(patch, y)

        assert torch.equal(in_another_thread(serve), other)
        assert torch.equal(patch.source(), mine)


def test_every_task_asks_for_its_own() -> None:
    batches = [images(n) for n in (1, 2, 3)]
    with sparsiattn.patch(zoo.build("vit"), "token_drop", keep=0.5) as patch:
        right = [source_of(patch, x) for x in batches]

        async def serve(x: Tensor) -> Tensor:
            source_of(patch, x)
            await asyncio.sleep(0)
            return patch.source()

        async def main() -> list[Tensor]:
            return await asyncio.gather(*map(serve, batches))

        for told, expected in zip(asyncio.run(main()), right, strict=True):
            assert torch.equal(told, expected)
        assert torch.equal(patch.source(), right[-1])  # the one of the code around the loop


def test_two_patches_and_their_copies_are_kept_apart() -> None:
    models = zoo.build("vit"), zoo.build("vit")
    first, second = (sparsiattn.patch(model, "token_drop", keep=0.5) for model in models)
    told = source_of(first, images(2))
    assert source_of(second, images(3)).shape[0] == 3
    assert torch.equal(first.source(), told)


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):  # blocks run again to their end
            return checkpoint(self.block, x, use_reentrant=False)


def test_a_backward_pass_that_runs_blocks_again_is_no_forward_pass() -> None:
    model = zoo.build("vit")
    model.blocks = nn.Sequential(*map(_Checkpointed, model.blocks))
    with sparsiattn.patch(model, "token_drop", keep=0.5) as patch:
        loss = model(images(2)).square().sum()
        told = patch.source()
        loss.backward()
        assert torch.equal(patch.source(), told)
        loss = model(images(3)).square().sum()
        later = source_of(patch, images(1))
        loss.backward()
        assert torch.equal(patch.source(), later)


def test_a_record_lives_no_longer_than_patch_and_model() -> None:
    model = zoo.build("vit")
    patch = sparsiattn.patch(model, "token_drop", keep=0.5)
    source_of(patch, images(2))
    assert patch.last_pass is not None
    gone = [weakref.ref(model), weakref.ref(patch.last_pass[0].ids)]
    del model, patch
    gc.collect()
    assert [known() for known in gone] == [None, None]
