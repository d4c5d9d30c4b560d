"""Copies of a model for dry runs, usually on the meta device, and forward passes of them.

The user's weights, hooks and random number generators are not used or changed.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsiattn.attention.site import Site
from sparsiattn.errors import ProbeFailed, SparsiattnError, first_line
from sparsiattn.patching.discovery.failure import place_of
from sparsiattn.patching.discovery.host_hooks import copy_host_hooks
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.patching.discovery.module_copy import ATOMS, copy_modules
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.runtime.lifting import drop
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE
from sparsiattn.runtime.sdpa_intercept import intercepted
from sparsiattn.runtime.site_hooks import IDLE
from sparsiattn.strategies.config import Config

MetaInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a dry run."""

_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs")))
_OF_PATCHES = (PATCH_ATTRIBUTE, IDLE)
"""Attributes that a patch adds to modules."""
_DISPATCH, _UNDISPATCHED = "_hf_hook", "_old_forward"
"""Attributes that accelerate adds to a module whose weights it offloads."""


def meta_copy(model: nn.Module) -> Any:
    """A copy on the meta device, in eval mode, with the host's own hooks only.

    Raises:
        ProbeFailed: The model cannot be copied.
    """
    return _copied(model, _to_meta, _undispatch)


def value_copy(model: nn.Module) -> Any:
    """A copy that shares the model's weights, else like `meta_copy`; for models that need data.

    Raises:
        ProbeFailed: The model cannot be copied.
    """
    return _copied(model, _shared, _stay_on_the_slow_path)


def _stay_on_the_slow_path(module: nn.Module) -> None:
    if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        module.register_forward_pre_hook(_any_hook)


def _any_hook(module: nn.Module, args: Any) -> None:
    """Any hook disables torch's fused operators, whose parts no dispatch mode could see."""


def _copied(
    model: nn.Module, convert: Callable[[Tensor], Tensor], finish: Callable[[nn.Module], None]
) -> Any:
    modules = list(model.modules())
    memo: dict[int, Any] = {}
    for module in modules:
        _decide(module, convert, memo)
    try:
        copied = copy_modules(model, modules, memo)
    except Exception as error:
        raise ProbeFailed(
            f"{type(model).__name__} cannot be copied for the dry run: {error}"
        ) from error
    copy_host_hooks(modules, memo)
    trains = False
    for module in copied.modules():
        drop(module)
        finish(module)
        trains |= module.training
    if trains:
        copied.eval()  # not chained: some hosts override train() and return nothing
    return copied


def _decide(module: nn.Module, convert: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> None:
    """Fill the memo for attributes that are not copied deeply: tensors, hooks, locks."""
    for name, value in vars(module).items():
        if type(value) in ATOMS or name == "_modules":
            continue
        if name in _HOOKS:
            memo[id(value)] = OrderedDict()
        elif name in _OF_PATCHES:
            memo[id(value)] = None
        elif isinstance(value, _HOLDERS):
            for tensor in _tensors(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = convert(tensor)
        # a lock or handle is shared, too: the dry run does not use it
        elif name == _DISPATCH or isinstance(value, _IMMUTABLE) or not _copies(value):
            memo.setdefault(id(value), value)


def _undispatch(module: nn.Module) -> None:
    """Restore the original forward of a module whose weights accelerate would load."""
    attributes = vars(module)
    if _DISPATCH in attributes and _UNDISPATCHED in attributes:
        del attributes[_DISPATCH]
        attributes["forward"] = attributes.pop(_UNDISPATCHED)


def _shared(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach().clone()


_IMMUTABLE = (Config, Site)
"""Attributes of planners that need no copy."""
_HOLDERS = (Tensor, dict, list, tuple, set)
"""Types of tensors, and of what may contain some."""


def _copies(value: object) -> bool:
    if isinstance(value, nn.Module):
        return True
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _tensors(holder: Any) -> Iterator[Tensor]:
    """The tensor itself, or tensors in nested containers."""
    waiting = [holder]
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
        # quantised weights support few operations; only their shape is needed here
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def has_data(model: nn.Module) -> bool:
    """Whether the model has weights, in its parameters or offloaded by accelerate."""
    on_meta = False
    for module in model.modules():
        if _DISPATCH in vars(module):
            return True
        on_meta |= any(p.is_meta for p in module._parameters.values() if p is not None)
    return not on_meta


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
    """Run one forward pass of a copy and return its output.

    Tensors that the model creates on the default device are real in the first run, because a host
    may cache them outside of this model. If that fails because the host combines them with meta
    tensors, the model runs again with everything on the meta device.

    Args:
        model: A `meta_copy`, or a `value_copy`, which runs once only.
        inputs: The inputs of the copy.
        before_retry: Called before the model runs again.

    Raises:
        ProbeFailed: The model raised an error.
    """
    args, kwargs = inputs
    devices = sorted({x.device for x in tensors_in(inputs) if x.device.type == "cuda"}, key=str)
    quiet = warnings.catch_warnings()  # warnings of the host about this run are irrelevant
    randomness = torch.random.fork_rng(devices=devices)
    with intercepted(), randomness, torch.no_grad(), recalling(), quiet:
        warnings.simplefilter("ignore")
        try:
            return model(*args, **kwargs)
        except SparsiattnError:
            raise
        except Exception as error:
            if not any(x.is_meta for x in tensors_in(inputs)):
                raise _failure(model, inputs, error) from error
            before_retry()
        try:
            with torch.device("meta"), _NothingPadded():
                return model(*args, **kwargs)
        except SparsiattnError:
            raise
        except Exception as error:
            raise _failure(model, inputs, error) from error


class _NothingPadded(TorchFunctionMode):
    """Makes masks of a dry run behave as if everything was unmasked: one image needs no padding.

    For hosts that check whether all entries of a mask are True, they are; indexing with a mask
    returns all elements.
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
    shapes = " and ".join(str(tuple(x.shape)) for x in tensors_in(inputs))
    return ProbeFailed(
        f"a dry run of {type(model).__name__} with an input of shape {shapes} failed"
        f"{place_of(error, model)}: {first_line(error, named=True)}"
    )
