"""The dry run: a copy of the model without data runs once on the meta device and says which
modules call attention, how often and with which shapes. The user's weights, hooks and random
state are not involved."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsiattn.attention.sdpa import dense_attention
from sparsiattn.errors import ProbeFailed, SparsiattnError
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.runtime.lifting import Trial, drop, without_scores
from sparsiattn.runtime.multihead import WatchWeights, Weights
from sparsiattn.runtime.sdpa_intercept import install, pop, push

DryInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a dry run."""

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs")))


@dataclass(frozen=True)
class Call:
    """What a module did in the dry run, with a batch of one image.

    name, module: the innermost module running when attention was called (of the copy). parents:
    from the root down to its parent. q, k, v, mask: shapes. count: calls in one forward. weights:
    what became of the attention weights that `nn.MultiheadAttention` also returns. lifted: whether
    the module writes its attention out, see `lifting`. given, returned: shapes of the first tensor
    that the module took and returned. aspect: height over width of the image, in patches.
    """

    name: str
    module: nn.Module
    parents: tuple[nn.Module, ...]
    q: torch.Size
    k: torch.Size
    v: torch.Size
    mask: torch.Size | None
    mask_dtype: torch.dtype | None
    causal: bool
    count: int = 1
    uniform: bool = True
    weights: Weights = "unasked"
    lifted: bool = False
    given: torch.Size | None = None
    returned: torch.Size | None = None
    aspect: float = 1.0

    def nearest(self, attribute: str) -> Any:
        """The attribute of the module itself or of the closest parent that has it, else None."""
        for module in (self.module, *reversed(self.parents)):
            value = getattr(module, attribute, None)
            if value is not None:
                return value
        return None


def meta_copy(model: nn.Module) -> Any:
    """A structural copy on the meta device: no data, no hooks, eval mode."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _HOOKS:
            hooks = vars(module).get(name)
            if hooks is not None:
                memo[id(hooks)] = OrderedDict()
        for tensor in _tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
        memo.setdefault(id(vars(module).get("_sparsiattn_patch")), None)
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


def _home_name(name: str, module: nn.Module) -> str:
    """The module whose attention this is: an `nn.Softmax` belongs to the one that holds it."""
    return name.rpartition(".")[0] if isinstance(module, nn.Softmax) else name


class _Recorder:
    """Hooks on every module of the skeleton that tell which one is innermost."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: OrderedDict[str, Call] = OrderedDict()
        self.trial = Trial()
        self.watched: dict[str, WatchWeights] = {}
        self.given: dict[str, torch.Size] = {}
        self.returned: dict[str, torch.Size] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self.watched[name] = WatchWeights(module)
            parents = tuple(_chain(model, name))
            key = -1 - id(module)
            opener = self._opener(name, module, parents, key)
            module.register_forward_pre_hook(opener, with_kwargs=True)
            module.register_forward_hook(self._closer(name, key), always_call=True)
            self.trial.names[key] = _home_name(name, module)

    def clear(self) -> None:
        self.calls.clear()
        self.trial.clear()
        for watched in self.watched.values():
            watched.clear()

    def _opener(self, name: str, module: nn.Module, parents: Any, key: int) -> Any:
        def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool,
                   scale: float | None, gqa: bool) -> Tensor:  # fmt: skip
            before = self.calls.get(name)
            shapes = (q.shape, k.shape, v.shape)
            uniform = before is None or (
                before.uniform and (before.q, before.k, before.v) == shapes
            )
            self.calls[name] = Call(
                name, module, parents, q.shape, k.shape, v.shape,
                None if mask is None else mask.shape, None if mask is None else mask.dtype,
                causal, before.count + 1 if before else 1, uniform,
                lifted=self.trial.attending or (before is not None and before.lifted),
            )  # fmt: skip
            return dense_attention(q, k, v, mask, p, causal, scale=scale, gqa=gqa)

        def open_scope(_: nn.Module, args: Any, kwargs: Any) -> None:
            _note(self.given, name, (*args, *kwargs.values()))
            push(record, key)

        return open_scope

    def _closer(self, name: str, key: int) -> Any:
        def close(module: nn.Module, args: Any, output: Any) -> Any:
            pop(key)
            output = without_scores(output, home=key)
            _note(self.returned, name, output if isinstance(output, (tuple, list)) else (output,))
            return output

        return close


def _note(shapes: dict[str, torch.Size], name: str, values: Iterable[Any]) -> None:
    tensor = next((value for value in values if isinstance(value, Tensor)), None)
    if tensor is not None:
        shapes[name] = tensor.shape


def _chain(model: nn.Module, name: str) -> Iterator[nn.Module]:
    module = model
    for part in name.split(".") if name else []:
        yield module
        module = getattr(module, part)


@dataclass(frozen=True)
class Probe:
    """What a dry run saw: attention calls in order, ``(module name, what it is)`` of every other
    softmax, and the shapes of what the model returned."""

    calls: list[Call]
    softmaxes: list[tuple[str, str]]
    returned: list[torch.Size]


def probe(model: nn.Module, inputs: DryInputs) -> Probe:
    """Every attention call of a `meta_copy` for these inputs, those written by hand included."""
    install()
    recorder = _Recorder(model)
    try:
        with recorder.trial:
            output = run_dry(model, inputs, recorder.clear)
    except ProbeFailed:  # a host that takes nothing but tensors for its scores
        recorder.clear()
        output = run_dry(model, inputs, recorder.clear)
    weights = {name: watched.verdict() for name, watched in recorder.watched.items()}
    returned = shapes(output)
    del output  # was held until here: see `WatchWeights.verdict`
    calls = recorder.calls.values()
    found = [
        replace(
            call,
            weights=weights.get(call.name, "unasked"),
            given=recorder.given.get(call.name),
            returned=recorder.returned.get(call.name),
        )
        for call in calls
    ]
    softmaxes = recorder.trial.softmaxes.items()
    others = [(name or "(root)", what) for name, what in softmaxes if name not in recorder.calls]
    return Probe(found, others, returned)


def shapes(output: Any) -> list[torch.Size]:
    """Shapes of all tensors in a model's output."""
    if isinstance(output, Tensor):
        return [output.shape]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [shape for item in output for shape in shapes(item)]
    return []


def image_inputs(model: nn.Module, shape: tuple[int, ...]) -> DryInputs:
    """A float image of this shape in the model's own dtype, on the meta device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return (torch.empty(shape, dtype=dtype, device="meta"),), {}


def run_dry(
    model: nn.Module, inputs: DryInputs, before_retry: Callable[[], None] = lambda: None
) -> Any:
    """The output of one forward of a `meta_copy`; whatever the host raises becomes a `ProbeFailed`.

    Tensors the model makes on the default device are real at first: a host may cache them beyond
    this model. Only a host that mixes them with its operands runs again with all of them on meta.
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
    """A dry run has no values, and one image alone needs no padding. Hosts that ask whether all of
    a mask holds, to go on without it, are told so; those that index with a mask get all there is.
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


def _failure(model: nn.Module, inputs: DryInputs, error: Exception) -> ProbeFailed:
    given = (*inputs[0], *inputs[1].values())
    shapes = " and ".join(str(tuple(x.shape)) for x in given if isinstance(x, Tensor))
    return ProbeFailed(
        f"a dry run of {type(model).__name__} with an input of shape {shapes} failed: "
        f"{type(error).__name__}: {error}. Pass input=(1, channels, height, width) (or an "
        "example tensor) that the model accepts"
    )
