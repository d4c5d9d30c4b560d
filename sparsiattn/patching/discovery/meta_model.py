"""A copy of a model on the meta device, and a forward pass of it.

The user's weights, hooks and random state are not involved.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsiattn.errors import ProbeFailed, SparsiattnError
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.runtime.lifting import drop
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE

MetaInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a dry run."""

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs")))


def meta_copy(model: nn.Module) -> Any:
    """A structural copy on the meta device: no data, no hooks, eval mode.

    Raises:
        ProbeFailed: The model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _HOOKS:
            hooks = vars(module).get(name)
            if hooks is not None:
                memo[id(hooks)] = OrderedDict()
        for tensor in _tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
        memo.setdefault(id(vars(module).get(PATCH_ATTRIBUTE)), None)
    for module in model.modules():
        for value in vars(module).values():
            if id(value) not in memo and not _copies(value):
                memo[id(value)] = value  # a lock, a handle: shared, the dry run ignores it
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ProbeFailed(
            f"{type(model).__name__} cannot be copied for the dry run: {error}"
        ) from error
    for module in copied.modules():
        drop(module)
    copied.eval()  # some hosts' own train() returns nothing
    return copied


_PLAIN = (type(None), bool, int, float, str, bytes, tuple, list, dict, set, Tensor, nn.Module)


def _copies(value: object) -> bool:
    if isinstance(value, _PLAIN):
        return True
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors kept as plain attributes, however deep in containers."""
    waiting: list[Any] = [value for name, value in vars(module).items() if name != "_modules"]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)


def _to_meta(tensor: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):
        # quantised weights and their like know few operations; what matters here is the shape
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def shapes(output: Any) -> list[torch.Size]:
    """Shapes of all tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output.shape]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [shape for value in output for shape in shapes(value)]
    return []


def image_inputs(model: nn.Module, shape: tuple[int, ...]) -> MetaInputs:
    """A float image of this shape in the model's own dtype, on the meta device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return (torch.empty(shape, dtype=dtype, device="meta"),), {}


def run_dry(
    model: nn.Module, inputs: MetaInputs, before_retry: Callable[[], None] = lambda: None
) -> Any:
    """The output of one forward pass without data.

    Tensors the model makes on the default device are real at first: a host may cache them beyond
    this model. Only a host that mixes them with its operands runs again with all of them on meta.

    Args:
        model: A `meta_copy`.
        inputs: What to call it with.
        before_retry: Called where the model has to run again.

    Raises:
        ProbeFailed: The model raised something.
    """
    args, kwargs = inputs
    with torch.random.fork_rng(devices=[]), torch.no_grad(), recalling():
        try:
            return model(*args, **kwargs)
        except SparsiattnError:
            raise
        except Exception:
            before_retry()
        try:
            with torch.device("meta"), _NothingPadded():
                return model(*args, **kwargs)
        except SparsiattnError:
            raise
        except Exception as error:
            raise _failure(model, inputs, error) from error


class _NothingPadded(TorchFunctionMode):
    """A dry run has no values, and one image alone needs no padding.

    Hosts that check whether all of a mask holds, to go on without it, hear that it does; those that
    index with a mask get all there is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.ones((), dtype=torch.bool, device="cpu")
        if func is Tensor.__getitem__ and _is_mask(args[1]):
            return args[0].flatten(0, args[1].dim() - 1)
        if func is Tensor.__setitem__ and _is_mask(args[1]):
            return None
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool


def _failure(model: nn.Module, inputs: MetaInputs, error: Exception) -> ProbeFailed:
    values = (*inputs[0], *inputs[1].values())
    shapes = " and ".join(str(tuple(x.shape)) for x in values if isinstance(x, Tensor))
    return ProbeFailed(
        f"a dry run of {type(model).__name__} with an input of shape {shapes} failed: "
        f"{type(error).__name__}: {error}. Pass input=(1, channels, height, width) (or an "
        "example tensor) that the model accepts"
    )
