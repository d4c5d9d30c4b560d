"""Fully sharded training (FSDP2) of a copy of the user's model.

Sharding a module changes its class and its parameters, and no public function undoes that.
Therefore accelerate shards a copy, again for each stage, and the full weights are gathered into the
user's model when they are needed.
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
"""Keys of a value in an optimizer's state: the index of the weight, and the value's name."""
_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")


def kind_of(accelerator: Any) -> str:
    """The distributed type of accelerate: ``"NO"``, ``"MULTI_GPU"``, ``"FSDP"``, ..."""
    kind = accelerator.distributed_type
    return str(getattr(kind, "value", kind))


def is_sharded(accelerator: Any) -> bool:
    """Whether accelerate is set up for FSDP."""
    return kind_of(accelerator) == "FSDP"


def set_up(accelerator: Any, recipe: Recipe) -> None:
    """Configure accelerate for FSDP2, if it was requested.

    Raises:
        InvalidOption: accelerate is configured for a kind of training that is not supported.
    """
    requested = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if kind_of(accelerator) == "MULTI_CPU" and requested:
        _shard_on_cpu(accelerator)
    kind = kind_of(accelerator)
    if kind in _PLAIN:
        return
    if kind != "FSDP":
        raise InvalidOption(
            f"train() runs in one process, with DistributedDataParallel or with FSDP2, but "
            f"accelerate is set up for {kind}, which manages weights and optimizer itself: for "
            "sharded training set ACCELERATE_USE_FSDP=true and FSDP_VERSION=2 "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    plugin = accelerator.state.fsdp_plugin
    _check(plugin, recipe)
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # every process has the full model already, so weights need not be broadcast
    plugin.cpu_ram_efficient_loading = False
    half: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    # weights are gathered in half precision; gradients are summed in float32, as without sharding
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        **({} if recipe.mixed_precision == "no" else half)
    )


def _shard_on_cpu(accelerator: Any) -> None:
    """Enable FSDP on the CPU.

    accelerate can shard on the CPU, but its state supports that only for accelerators: for
    MULTI_CPU it omits the plugin and would train with DistributedDataParallel.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    # accelerate copies one over the other when they are read, so both must be set
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _check(plugin: Any, recipe: Recipe) -> None:
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise InvalidOption(
            "FSDP version 1 flattens the weights of a block into one, so trained and frozen "
            "weights cannot be separated: set FSDP_VERSION=2 (accelerate launch --fsdp_version 2; "
            "accelerate 1.7 or newer)"
        )
    policy = plugin.auto_wrap_policy
    if "size_based" in getattr(getattr(policy, "func", policy), "__name__", ""):
        raise InvalidOption(
            "size-based wrapping of FSDP may separate planners from their attention: set "
            "FSDP_AUTO_WRAP_POLICY to TRANSFORMER_BASED_WRAP, and FSDP_TRANSFORMER_CLS_TO_WRAP to "
            "the class of the model's blocks (timm: Block)"
        )
    if plugin.activation_checkpointing:
        raise InvalidOption(
            "FSDP_ACTIVATION_CHECKPOINTING replaces patched blocks by other modules: unset it and "
            "set grad_checkpointing: true in the recipe"
        )
    if recipe.mixed_precision == "fp16":
        raise InvalidOption("sharded training does not support mixed_precision='fp16': use 'bf16'")
    averaged = [stage.name for stage in recipe.stages if stage.ema_decay is not None]
    if averaged:
        raise InvalidOption(
            f"stages {averaged} average weights (ema_decay) after every update, which would gather "
            "the full model each time in sharded training: remove ema_decay, or train without FSDP"
        )


def check(patch: Patch, stage: Stage) -> None:
    """Raise `InvalidOption` if this patch or stage cannot be trained in shards."""
    if stage.prune or stage.penalties:
        names = ["prune"] if stage.prune else stage.penalties
        raise InvalidOption(
            f"stage {stage.name!r}: {' and '.join(names)} would need full weights or attention in "
            "every process: train without FSDP"
        )
    if stage.grad_checkpointing and patch.blocks:
        raise InvalidOption(
            f"stage {stage.name!r}: blocks that carry fewer tokens identify their input by its "
            "address when grad_checkpointing recomputes them, and sharding passes another tensor: "
            "remove grad_checkpointing, or train without FSDP"
        )


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of the model to be sharded; the model itself moves to the CPU to free device memory.

    FSDP cannot shard scalars, so they are vectors of one element in the copy.
    """
    copy = deepcopy(model.to("cpu"))
    vectors: dict[int, nn.Parameter] = {}  # keeps tied weights tied
    for module in copy.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.dim() == 0:
                vector = nn.Parameter(weight.detach().reshape(1), weight.requires_grad)
                module._parameters[name] = vectors.setdefault(id(weight), vector)
    return copy


def scalars(model: nn.Module, copy: nn.Module, optimizer: Any) -> set[int]:
    """Indices of the weights in the copy's optimizer that are scalars in the model."""
    names = {name for name, weight in model.named_parameters() if weight.dim() == 0}
    vectors = {id(weight) for name, weight in copy.named_parameters() if name in names}
    return {index for index, weight in enumerate(_weights(optimizer)) if id(weight) in vectors}


def _weights(optimizer: Any) -> list[Any]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def prepare(
    accelerator: Any, objective: nn.Module, optimizer: Any, reshard: bool
) -> tuple[Any, Any]:
    """Shard the objective and its optimizer.

    Args:
        accelerator: The accelerator, after `set_up`.
        objective: The objective, which holds the copy of the model.
        optimizer: The optimizer of the copy.
        reshard: Whether weights gathered for a forward pass are freed before the backward pass.
            It must be False to train planners: their losses are computed inside blocks that run
            without gradients, and whose weights would be freed before the planners' backward pass.
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
    """Copy the full weights of a sharded objective into the user's model, in every process.

    Weights are gathered one at a time, so that no device holds all of them.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an aborted step leaves weights gathered and rounded
    sharded: Any = objective.model
    weights = model.state_dict()
    for name, value in sharded.state_dict().items():
        weights[name].copy_(full_tensor(value).reshape(weights[name].shape))


def gathered(state: dict[str, Any], scalars: set[int], keep: bool) -> dict[str, Any]:
    """An optimizer's state with full tensors on the CPU, as without sharding.

    Every process must call this.

    Args:
        state: The state of the sharded optimizer.
        scalars: Indices of weights that are scalars in the model.
        keep: Whether this process keeps the tensors; else they are None.
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
    """The inverse of `gathered`: a full state, sharded as the weights of the optimizer."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = _weights(optimizer)

    def cut(path: Path, value: Any) -> Any:
        index, name = path[0].key, path[1].key
        weight = weights[index]
        if not isinstance(value, Tensor) or not isinstance(weight, DTensor):
            return value
        if index in scalars and name != "step":  # "step" does not have the shape of the weight
            value = value.reshape(weight.shape)
        if value.shape != weight.shape:
            return value
        mesh = weight.device_mesh
        value = value.to(mesh.device_type)
        return distribute_tensor(value, mesh, weight.placements, src_data_rank=None)

    return {**state, "state": tree_map_with_path(cut, state["state"])}


def full_tensor(value: Any) -> Any:
    """The full tensor of a sharded one, in every process; other values are returned unchanged."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
