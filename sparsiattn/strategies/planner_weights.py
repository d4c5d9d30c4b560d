"""Initial weights of planners, which can be restored after their memory was replaced.

They follow from the arguments of the planner's constructor. So they can be computed again after
``to_empty`` of a model that was built on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class PlannerWeights(nn.Module):
    """Base of planners with weights.

    A checkpoint of the dense model still loads strictly: weights that it lacks keep their values,
    or get their initial values if they are on the meta device.
    """

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        planner = super().__new__(cls)
        # copies and pickles come here without arguments and overwrite this with their own
        planner.__dict__["_made_with"] = (args, kwargs)
        return planner

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(keep_missing)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Set weights and buffers to their initial values."""
        present = dict(_tensors(self))
        with torch.no_grad():
            for name, value in _tensors(self._made_anew()):
                _fill(present[name], value)

    def _made_anew(self) -> nn.Module:
        """A planner made with the same arguments, on the CPU."""
        args, kwargs = self._made_with
        with torch.inference_mode(False), torch.device("cpu"):
            return type(self)(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        had_none = _has_no_values(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `Module.to_empty` can be recognised only by its inner function
        emptied = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        if (emptied or had_none) and not _has_no_values(self):
            self.reset_parameters()
        return self


def adopt_parts(planner: nn.Module) -> None:
    """Make ``reset_parameters`` of a planner's submodules (`nn.Linear`) reset the planner.

    Otherwise code that resets every module of a model would initialise them at random.
    """
    for part in planner.modules() if isinstance(planner, PlannerWeights) else ():
        if not isinstance(part, PlannerWeights) and hasattr(part, "reset_parameters"):
            part.reset_parameters = planner.reset_parameters


def keep_missing(
    module: nn.Module, state: dict[str, Any], prefix: str, local: dict[str, Any], *_: Any
) -> None:
    """Hook that runs before a state dict is loaded, so that dense checkpoints load strictly.

    If the state dict has none of the planner's weights, the current ones are added.
    """
    present = {prefix + name: value for name, value in module.state_dict().items()}
    if any(name in state for name in present):
        return
    if isinstance(module, PlannerWeights) and local.get("assign_to_params_buffers"):
        # meta tensors would be assigned unchanged, and never get values
        like = next((x for x in state.values() if isinstance(x, Tensor)), None)
        device = torch.device("cpu") if like is None else like.device
        made = dict(_tensors(module._made_anew()))
        for name, value in present.items():
            first = made.get(name.removeprefix(prefix))
            if value.is_meta and first is not None:
                present[name] = first.detach().to(device, value.dtype)
    state.update(present)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _has_no_values(module: nn.Module) -> bool:
    return any(tensor.is_meta for _, tensor in _tensors(module))


def _fill(tensor: Tensor, value: Tensor) -> None:
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor  # a second to import

        value, mesh = value.to(tensor.device, tensor.dtype), tensor.device_mesh
        # every process has the full value already, so nothing is communicated
        placements: Any = getattr(tensor, "placements", None)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    tensor.copy_(value)
