"""Small tools of forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from sparsiattn.errors import ExportFailed, InvalidOption

T = TypeVar("T")


class NotScriptable(ExportFailed, AttributeError):
    """A patched model cannot be scripted; an `AttributeError`, so that ``hasattr`` still works."""


class ScriptRefusal:
    """Base of a patched model's hooks: raises when `torch.jit.script` reads their ``__name__``."""

    @property
    def __name__(self) -> str:
        raise NotScriptable(
            "torch.jit.script cannot read the hooks of a patched model: use "
            "sparsiattn.export(model, images, 'model.pt2'), or torch.jit.trace"
        )


def pre_hook_in_front(
    module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False
) -> RemovableHandle:
    """Register a forward pre-hook that runs before those that are there."""
    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=with_kwargs)
    _settle_order(module._forward_pre_hooks)
    return handle


def hook_in_front(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a forward hook that runs before those that are there."""
    handle = module.register_forward_hook(hook, prepend=True)
    _settle_order(module._forward_hooks)
    return handle


def _settle_order(hooks: dict[int, Any]) -> None:
    """Add all hooks again in the order in which they run.

    A caller of the model that is compiled finds hooks by their place among the keys. Older versions
    of Dynamo take that in the order in which hooks were added, and guard on the wrong ones.
    """
    if TorchVersion(torch.__version__) < "2.15":
        in_order = list(hooks.items())
        hooks.clear()
        hooks.update(in_order)


def tensors_in(values: Any) -> list[Tensor]:
    """Tensors among nested arguments or outputs, in order."""
    tensors: list[Tensor] = []
    _collect(values, tensors)
    return tensors


def _collect(values: Any, tensors: list[Tensor]) -> None:
    """Append tensors; common types are handled without pytree, as dry runs call this often."""
    kind = type(values)
    if isinstance(values, Tensor):
        tensors.append(values)
    elif kind is tuple or kind is list:
        for value in values:
            _collect(value, tensors)
    elif kind is dict:
        for value in values.values():
            _collect(value, tensors)
    elif kind not in _LEAVES:
        tensors += [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


_LEAVES = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout})


def first_tensor(values: Any) -> Tensor | None:
    """The tensor itself, or the first one in a tuple, list or mapping."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


def first_argument(args: Any, kwargs: Any) -> Tensor | None:
    """The first tensor of a call's arguments."""
    return first_tensor(args) if args else first_tensor(kwargs)


def replace_first(output: Any, old: Tensor, new: Tensor) -> Any:
    """A module's output (a tensor, or a sequence that holds one) with that tensor replaced."""
    if isinstance(output, Tensor):
        return new
    return type(output)(new if value is old else value for value in output)


def refuse_fx(values: Any) -> None:
    """Refuse torch.fx proxies among a hook's arguments, as a patch cannot be traced symbolically.

    Raises:
        InvalidOption: An argument is a proxy.
    """
    has_proxies = False
    for value in values:  # a plain loop, as this runs at every site
        has_proxies = has_proxies or isinstance(value, Proxy)
    if has_proxies and not torch.compiler.is_compiling():
        raise InvalidOption(
            "torch.fx (a feature extractor, a graph rewriter) cannot trace a patched model: get "
            "features of the patched model with forward hooks, forward_intermediates or "
            "features_only=True instead, or call unpatch() before tracing"
        )


@dataclass
class RecomputeCache(Generic[T]):
    """Values noted for an input tensor, for a checkpoint that recomputes the code.

    A checkpoint passes the identical input tensor to the code that it recomputes in the backward
    pass, possibly in another thread. Entries die with their tensor, and copies of the model start
    empty.

    Attributes:
        entries: Weak reference to the tensor and the noted value, by the address of its data.
    """

    entries: dict[int, tuple[ref[Tensor], T]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": {}}

    def find(self, x: Tensor | None) -> T | None:
        """The value noted for this very tensor, if the tensor is still alive."""
        if x is None or is_functorch(x):
            return None
        entry = self.entries.get(x.data_ptr())
        return entry[1] if entry is not None and entry[0]() is not None else None

    def note(self, x: Tensor, value: T) -> None:
        """Note a value. It must not hold ``x``, or both would live as long as this cache."""
        for key in [key for key, (alive, _) in self.entries.items() if alive() is None]:
            del self.entries[key]
        self.entries[x.data_ptr()] = (ref(x), value)


def is_functorch(x: Tensor) -> bool:
    """Whether a functorch transform (``vmap``, ``grad``) wraps the tensor.

    Checkpoints cannot be combined with these transforms.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
