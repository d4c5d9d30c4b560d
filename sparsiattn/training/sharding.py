"""Fully sharded training (FSDP2): every process holds pieces of a copy, the user's model gets the
whole weights where they are looked at.

Sharding a module changes its class and its parameters, and no public function undoes that. So a
copy is sharded, anew for each stage; accelerate does that and gives its optimizer the pieces.
"""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_with_path

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.handle import Patch
from sparsiattn.training.recipe import Recipe
from sparsiattn.training.stage import Stage

Path = tuple[Any, ...]
"""Keys of a value in an optimizer's state: the weight's number, the value's name."""
_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")


def kind_of(accelerator: Any) -> str:
    """``"NO"``, ``"MULTI_GPU"``, ``"FSDP"``, ..."""
    kind = accelerator.distributed_type
    return str(getattr(kind, "value", kind))


def is_sharded(accelerator: Any) -> bool:
    """Whether accelerate is set up for FSDP."""
    return kind_of(accelerator) == "FSDP"


def set_up(accelerator: Any, recipe: Recipe) -> None:
    """Make accelerate's choice ours: FSDP2 where it was asked for, else nothing.

    Raises `InvalidOption` for ways to train that are not supported, before anything starts.
    """
    requested = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if kind_of(accelerator) == "MULTI_CPU" and requested:
        _shard_on_cpu(accelerator)
    kind = kind_of(accelerator)
    if kind in _PLAIN:
        return
    if kind != "FSDP":
        raise InvalidOption(
            f"train() runs in one process, by DistributedDataParallel or by FSDP2, and accelerate "
            f"is set up for {kind}, which keeps weights and optimizer in engines and checkpoints "
            "of its own: for sharded training set ACCELERATE_USE_FSDP=true and FSDP_VERSION=2 "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    plugin = accelerator.state.fsdp_plugin
    _check(plugin, recipe)
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # every process has the whole model already: there is nothing to send it
    plugin.cpu_ram_efficient_loading = False
    half: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    # weights travel in half precision; gradients are added up in full, as without sharding
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        **({} if recipe.mixed_precision == "no" else half)
    )


def _shard_on_cpu(accelerator: Any) -> None:
    """accelerate shards on the CPU as well, but its state only says so for accelerators: for
    MULTI_CPU it leaves the plugin out and would train by DistributedDataParallel."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    # the one is copied over the other whenever somebody asks
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _check(plugin: Any, recipe: Recipe) -> None:
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise InvalidOption(
            "FSDP in version 1 flattens weights of a block into one, in which those that a stage "
            "trains cannot be told from those that rest: set FSDP_VERSION=2 (accelerate launch "
            "--fsdp_version 2; accelerate 1.7 and up)"
        )
    policy = plugin.auto_wrap_policy
    if "size_based" in getattr(getattr(policy, "func", policy), "__name__", ""):
        raise InvalidOption(
            "FSDP by size may part planners from their attention: set FSDP_AUTO_WRAP_POLICY to "
            "TRANSFORMER_BASED_WRAP, and FSDP_TRANSFORMER_CLS_TO_WRAP to the class of the model's "
            "blocks (timm: Block)"
        )
    if plugin.activation_checkpointing:
        raise InvalidOption(
            "FSDP_ACTIVATION_CHECKPOINTING puts other modules in the place of patched blocks: "
            "leave it out and set grad_checkpointing: true in the recipe"
        )
    if recipe.mixed_precision == "fp16":
        raise InvalidOption("mixed_precision='fp16' is not for sharded training: take 'bf16'")
    averaged = [stage.name for stage in recipe.stages if stage.ema_decay is not None]
    if averaged:
        raise InvalidOption(
            f"stages {averaged} average weights (ema_decay) after every update, for which sharded "
            "training would gather the whole model each time: leave ema_decay out, or train "
            "without FSDP"
        )


def check(patch: Patch, stage: Stage) -> None:
    """Raise `InvalidOption` for what this patch or stage cannot do in shards."""
    if stage.prune or stage.penalties:
        names = ["prune"] if stage.prune else stage.penalties
        raise InvalidOption(
            f"stage {stage.name!r}: {' and '.join(names)} would need whole weights or attention in "
            "every process: train without FSDP"
        )
    if stage.grad_checkpointing and patch.blocks:
        raise InvalidOption(
            f"stage {stage.name!r}: blocks that carry fewer tokens know their input again by its "
            "address when grad_checkpointing runs them once more, and sharding hands them another: "
            "leave grad_checkpointing out, or train without FSDP"
        )


def copy_of(model: nn.Module) -> nn.Module:
    """What will be sharded; the model itself waits on the CPU, so that it takes no room.

    FSDP cannot shard scalars: in the copy they are vectors of one element.
    """
    copy = deepcopy(model.to("cpu"))
    vectors: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in copy.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.dim() == 0:
                vector = nn.Parameter(weight.detach().reshape(1), weight.requires_grad)
                module._parameters[name] = vectors.setdefault(id(weight), vector)
    return copy


def scalars(model: nn.Module, copy: nn.Module, optimizer: Any) -> set[int]:
    """Numbers of the weights in an optimizer of the copy that are scalars in the model."""
    names = {name for name, weight in model.named_parameters() if weight.dim() == 0}
    vectors = {id(weight) for name, weight in copy.named_parameters() if name in names}
    return {index for index, weight in enumerate(_weights(optimizer)) if id(weight) in vectors}


def _weights(optimizer: Any) -> list[Any]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def prepare(
    accelerator: Any, objective: nn.Module, optimizer: Any, reshard: bool
) -> tuple[Any, Any]:
    """The objective sharded, and the optimizer of its pieces.

    Args:
        accelerator: Set up by `set_up`.
        objective: Holds the copy of the model.
        optimizer: Of the copy.
        reshard: Whether weights that were gathered for a forward pass are given up before the
            backward pass. Planners forbid that: their losses are computed inside blocks that
            themselves run without gradients, and whose weights would be gone when the backward
            pass comes to the planners.
    """
    inner: Any = objective.model
    objective._no_split_modules = getattr(inner, "_no_split_modules", None)  # type: ignore[assignment]
    try:
        sharded, optimizer = accelerator.prepare(objective, optimizer)
    except ValueError as error:
        raise InvalidOption(f"accelerate cannot shard {type(inner).__name__}: {error}") from error
    if not reshard:
        sharded.set_reshard_after_forward(False)
    return sharded, optimizer


@torch.no_grad()
def gather(objective: nn.Module, model: nn.Module) -> None:
    """Copy the whole weights of a sharded objective into the user's model, in every process.

    One weight at a time, so that no device ever holds all of them.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a step that was given up leaves weights gathered, and rounded
    sharded: Any = objective.model
    weights = model.state_dict()
    for name, value in sharded.state_dict().items():
        weights[name].copy_(full_tensor(value).reshape(weights[name].shape))


def gathered(state: dict[str, Any], scalars: set[int], keep: bool) -> dict[str, Any]:
    """An optimizer's state with whole tensors on the CPU, as one process would have it.

    All processes must call; those without ``keep`` get no tensors.
    """

    def assemble(path: Path, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        tensor = full_tensor(value)
        if not keep:
            return None
        scalar = path[0].key in scalars and tensor.numel() == 1
        return tensor.cpu().reshape(() if scalar else tensor.shape)

    return {**state, "state": tree_map_with_path(assemble, state["state"])}


def scattered(state: dict[str, Any], scalars: set[int], optimizer: Any) -> dict[str, Any]:
    """Such a state with this process's pieces, cut as the weights are that they belong to."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = _weights(optimizer)

    def cut(path: Path, value: Any) -> Any:
        index, name = path[0].key, path[1].key
        weight = weights[index]
        if not isinstance(value, Tensor) or not isinstance(weight, DTensor):
            return value
        if index in scalars and name != "step":  # torch's count of updates, of no weight's shape
            value = value.reshape(weight.shape)
        if value.shape != weight.shape:
            return value
        mesh = weight.device_mesh
        value = value.to(mesh.device_type)
        return distribute_tensor(value, mesh, weight.placements, src_data_rank=None)

    return {**state, "state": tree_map_with_path(cut, state["state"])}


def full_tensor(value: Any) -> Any:
    """A tensor that was cut into pieces, put together in every process; others as they are."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
