"""The dry run: a copy of the model without data runs once on the meta device and says which
modules call attention, how often and with which shapes. The user's weights, hooks and random
state are not involved."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import ProbeFailed, SparsiattnError
from sparsiattn.interception import dense_attention, install, pop, push

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs")))


@dataclass(frozen=True)
class Call:
    """What a module did in the dry run, with a batch of one image.

    name, module: the innermost module running when attention was called (of the copy). parents:
    from the root down to its parent. q, k, v, mask: shapes. count: calls in one forward.
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

    def nearest(self, attribute: str) -> Any:
        """The attribute of the module itself or of the closest parent that has it, else None."""
        for module in (self.module, *reversed(self.parents)):
            value = getattr(module, attribute, None)
            if value is not None:
                return value
        return None


def skeleton(model: nn.Module) -> Any:
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
    return copied.eval()


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
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Recorder:
    """Hooks on every module of the skeleton that tell which one is innermost."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: OrderedDict[str, Call] = OrderedDict()
        for name, module in model.named_modules():
            parents = tuple(_chain(model, name))
            key = -1 - len(self.calls) - id(module)
            module.register_forward_pre_hook(self._opener(name, module, parents, key))
            module.register_forward_hook(lambda *_, key=key: pop(key), always_call=True)

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
            )  # fmt: skip
            return dense_attention(q, k, v, mask, p, causal, scale=scale, gqa=gqa)

        return lambda *_: push(record, key)


def _chain(model: nn.Module, name: str) -> Iterator[nn.Module]:
    module = model
    for part in name.split(".") if name else []:
        yield module
        module = getattr(module, part)


def probe(model: nn.Module, shape: tuple[int, ...]) -> list[Call]:
    """Every attention call of a `skeleton` for a float input of this shape, in order."""
    install()
    recorder = _Recorder(model)
    run_dry(model, shape)
    return list(recorder.calls.values())


def run_dry(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """One forward of a `skeleton` and what it returns; whatever it raises becomes a `ProbeFailed`,
    except what this library says itself."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            return model(torch.empty(shape, dtype=dtype, device="meta"))
    except SparsiattnError:
        raise
    except Exception as error:
        raise ProbeFailed(
            f"a dry run of {type(model).__name__} with an input of shape {shape} failed: "
            f"{type(error).__name__}: {error}. Pass input=(1, channels, height, width) (or an "
            "example tensor) that the model accepts"
        ) from error
