"""Counts the kernels that a program would launch on a GPU, without one.

Tensors only claim to be on a GPU, so nothing is computed: what is counted is what torch dispatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsiattn.attention import geometry, sdpa
from sparsiattn.kernels import gpu_prices, triton_plan
from sparsiattn.strategies.predictor import KnownTables

ModuleT = TypeVar("ModuleT", bound=nn.Module)

FREE = (
    "aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::lift_fresh", "aten::new_empty", "aten::new_empty_strided",
)  # fmt: skip
"""Operators that launch nothing and are no views by their schema."""


class Launches(TorchDispatchMode):
    """Records the operators that launch kernels, and the launches inside of custom operators.

    Attributes:
        names: Names of operators and of Triton kernels, in the order of the calls.
        copied_to_device: Names of operators that copied from the CPU to the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copied_to_device: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = _custom_operators().get(func)
        if body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        computes = any(isinstance(x, Tensor) for x in tree_leaves(out))
        if computes and not (_is_view(func) or name in FREE):
            self.names.append(name.removeprefix("aten::"))
        if _is_copy_to_device(args, out):
            self.copied_to_device.append(name)
        return out


def _custom_operators() -> dict[Any, Callable[..., Any]]:
    """The Python bodies of this library's operators that launch Triton kernels."""
    from torch.library import CustomOpDef

    from sparsiattn.kernels._triton import ops, plan_ops

    names = {**vars(ops), **vars(plan_ops)}
    found = (x for x in names.values() if isinstance(x, CustomOpDef))
    return {definition._opoverload: definition._init_fn for definition in found}


def _is_view(func: Any) -> bool:
    """Whether an operator's result shares the memory of an argument that it does not write to."""
    infos = (argument.alias_info for argument in func._schema.arguments)
    return any(info is not None and not info.is_write for info in infos)


def _is_copy_to_device(args: Sequence[Any], out: object) -> bool:
    if not isinstance(out, Tensor) or out.device.type != "cuda":
        return False
    return any(
        isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in tree_leaves(args)
    )


@contextmanager
def fake_gpu(*, with_triton: bool = True) -> Iterator[None]:
    """Tensors are fake, tables of fake tensors are cached, and torch's SDPA is one launch.

    Args:
        with_triton: Whether the GPU is new enough for planning in Triton.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(geometry, "_TABLES", {}),
        mock.patch.object(geometry, "_is_lasting", lambda part: isinstance(part, Tensor)),
        mock.patch.object(sdpa, "_original", _fused_attention),
        # fake tensors have no values: a planner's tables count as those of the start
        mock.patch.object(KnownTables, "equals", return_value=True),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        # older torch starts CUDA for the first fake tensor on a GPU, if that says it is there
        mock.patch.object(fake_tensor, "init_gpu_context"),
        # no later test may take this GPU for one that is there
        mock.patch.object(gpu_prices, "_KNOWN", {}),
        mock.patch.object(triton_plan, "is_planned_on", return_value=with_triton),
        torch.no_grad(),
    ):
        yield


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    b, h, n, _d = q.shape
    # one operator, of the right shape; laid out as by torch's fused attention
    return torch.zeros(b, n, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)


def on_gpu(module: ModuleT) -> ModuleT:
    """A module whose weights are on the GPU; `nn.Module.to` cannot move them to a fake one."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(_there(weight), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _there(buffer))
    return module


def _there(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


@contextmanager
def counted() -> Iterator[Launches]:
    """Count the launches inside; Triton kernels are recorded by name and do not run."""
    from sparsiattn.kernels._triton.launch import Launch

    launches = Launches()

    def record(launch: Launch, device: torch.device) -> None:
        if launch.programs:
            launches.names.append(launch.kernel.__name__)

    with mock.patch.object(Launch, "run", record), launches:
        yield launches
