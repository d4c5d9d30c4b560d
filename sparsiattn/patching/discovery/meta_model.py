"""A copy of a model, on the meta device wherever it runs there, and a forward pass of it.

The user's weights, hooks and random state are not involved.
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

from sparsiattn.errors import ProbeFailed, SparsiattnError, first_line
from sparsiattn.patching.discovery.failure import place_of
from sparsiattn.patching.discovery.host_hooks import copy_host_hooks
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.runtime.lifting import drop
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE
from sparsiattn.runtime.sdpa_intercept import intercepted

MetaInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a dry run."""

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs")))
_DISPATCH, _UNDISPATCHED = "_hf_hook", "_old_forward"
"""What accelerate leaves in a module whose weights it keeps elsewhere."""


def meta_copy(model: nn.Module) -> Any:
    """A structural copy on the meta device: no data, no hooks but the host's own, eval mode.

    Raises:
        ProbeFailed: The model cannot be copied.
    """
    copied = _copied(model, _to_meta)
    for module in copied.modules():
        _undispatch(module)
    return copied


def value_copy(model: nn.Module) -> Any:
    """A copy that shares the model's weights, else like `meta_copy`: for what runs on data only.

    Raises:
        ProbeFailed: The model cannot be copied.
    """
    copied = _copied(model, _shared)
    for module in copied.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            module.register_forward_pre_hook(_stay_on_the_slow_path)
    return copied


def _stay_on_the_slow_path(module: nn.Module, args: Any) -> None:
    """A hook of any kind keeps torch from its fused operators, which no mode looks into."""


def _copied(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> Any:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _HOOKS:
            hooks = vars(module).get(name)
            if hooks is not None:
                memo[id(hooks)] = OrderedDict()
        for tensor in _tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = convert(tensor)
        memo.setdefault(id(vars(module).get(PATCH_ATTRIBUTE)), None)
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) not in memo and (name == _DISPATCH or not _copies(value)):
                memo[id(value)] = value  # a lock, a handle: shared, the dry run ignores it
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ProbeFailed(
            f"{type(model).__name__} cannot be copied for the dry run: {error}"
        ) from error
    for module in copied.modules():
        drop(module)
    copy_host_hooks(model, memo)
    copied.eval()  # some hosts' own train() returns nothing
    return copied


def _undispatch(module: nn.Module) -> None:
    """Give a module whose weights accelerate moves its own forward: without data nothing moves."""
    attributes = vars(module)
    if _DISPATCH in attributes and _UNDISPATCHED in attributes:
        del attributes[_DISPATCH]
        attributes["forward"] = attributes.pop(_UNDISPATCHED)


def _shared(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach().clone()


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


def has_data(model: nn.Module) -> bool:
    """Whether the model could run: its weights are somewhere, if not in its parameters."""
    moved = any(_DISPATCH in vars(module) for module in model.modules())
    return moved or not any(parameter.is_meta for parameter in model.parameters())


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
    """The output of one forward pass, without data where the inputs have none.

    Tensors the model makes on the default device are real at first: a host may cache them beyond
    this model. Only a host that mixes them with its operands runs again with all of them on meta.

    Args:
        model: A `meta_copy`, or a `value_copy`, which runs once.
        inputs: What to call it with.
        before_retry: Called where the model has to run again.

    Raises:
        ProbeFailed: The model raised something.
    """
    args, kwargs = inputs
    devices = sorted({x.device for x in tensors_in(inputs) if x.device.type == "cuda"}, key=str)
    quiet = warnings.catch_warnings()  # what a host says of a run without gradients is no news
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
    shapes = " and ".join(str(tuple(x.shape)) for x in tensors_in(inputs))
    return ProbeFailed(
        f"a dry run of {type(model).__name__} with an input of shape {shapes} failed"
        f"{place_of(error, model)}: {first_line(error, named=True)}"
    )
