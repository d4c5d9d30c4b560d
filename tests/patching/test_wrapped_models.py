"""Weights that train behind wrappers made without them: every process would have its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.models import VisionTransformer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsiattn

TRAINS: dict[str, dict[str, Any]] = {
    "token_drop": {"keep": 0.5, "score": "learned"},
    "sit": {"keep": 0.5},
    "patch_merger": {"keep": 8},
}
FROZEN: dict[str, dict[str, Any]] = {"connectivity": {"k": 0.25}, "topk": {"k": 0.25}}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def sharded_inside(model: VisionTransformer) -> nn.Module:
    sharded(model.blocks[1])
    return model


def replicated_inside(model: VisionTransformer) -> nn.Module:
    return nn.Sequential(nn.Identity(), DistributedDataParallel(model))


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "FSDPModule": sharded,
    "FSDPModule inside": sharded_inside,
    "DistributedDataParallel inside": replicated_inside,
    "compiled": lambda model: torch.compile(DistributedDataParallel(model)),
}
INSIDE = [name for name in WRAPPERS if "FSDP" in name or "inside" in name]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("strategy", TRAINS)
def test_weights_that_train_are_refused_behind_a_wrapper(strategy: str, wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper](vit())
    names = [name for name, _ in wrapped.named_parameters()]
    with pytest.raises(sparsiattn.SparsiattnError, match="first, then wrap it") as refusal:
        sparsiattn.patch(wrapped, strategy, input=(1, 3, 32, 32), **TRAINS[strategy])
    assert wrapper.split()[0] in str(refusal.value) or wrapper == "compiled"
    assert [name for name, _ in wrapped.named_parameters()] == names
    wrapped(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("strategy", FROZEN)
def test_frozen_weights_are_equal_everywhere_and_welcome(strategy: str) -> None:
    wrapped = DistributedDataParallel(vit())
    with sparsiattn.patch(wrapped, strategy, **FROZEN[strategy]):
        wrapped(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("wrapper", INSIDE)
def test_wrappers_in_the_model_are_named(wrapper: str) -> None:
    with pytest.raises(sparsiattn.SparsiattnError, match="first, then wrap it"):
        sparsiattn.patch(WRAPPERS[wrapper](vit()), "topk", k=0.25, input=(1, 3, 32, 32))


@pytest.mark.parametrize("strategy", TRAINS)
def test_patched_first_they_train(strategy: str) -> None:
    model = vit().train()
    sparsiattn.patch(model, strategy, **TRAINS[strategy])
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(torch.randn(2, 3, 32, 32)).square().sum().backward()


def test_a_wrapper_that_patch_was_not_shown_is_noticed_in_training() -> None:
    model = vit().train()
    wrapped = DistributedDataParallel(model)
    sparsiattn.patch(model, "token_drop", **TRAINS["token_drop"])
    with pytest.raises(sparsiattn.SparsiattnError, match="then wrap it"):
        wrapped(torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        wrapped.eval()(torch.randn(2, 3, 32, 32))


def test_a_saved_patch_is_refused_behind_a_wrapper(tmp_path: Path) -> None:
    with sparsiattn.patch(vit(), "token_drop", **TRAINS["token_drop"]) as patch:
        patch.save(tmp_path)
    with pytest.raises(sparsiattn.SparsiattnError, match="first, then wrap it"):
        sparsiattn.load(DistributedDataParallel(vit()), tmp_path)
