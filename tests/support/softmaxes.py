"""Which modules of a model compute softmax attention, found by running it, without the library:
what the census compares the sites of a patch with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

# softmax over the product of q and k, but between channels, or between images of the batch
NOT_TOKENS = {
    "XCA": "attention over channels",
    "CrossCovarianceAttn": "attention over channels",
    "ChannelAttention": "attention over channels",
    "ChannelAttentionV2": "attention over channels",
    "SpatialTransformerBlock": "attention over the images of the batch",
}

PRODUCT, WEIGHTS, OTHER = "product", "weights", "other softmax"
_MATMULS = {
    "matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm", "mm", "tensordot",
}  # fmt: skip
_SOFTMAXES = {"softmax", "_softmax"}
# what an attention module does to scores on their way: talking heads mix them by a linear layer
_ENDS = {"layer_norm", "batch_norm", "group_norm", "rms_norm", "normalize"}


@dataclass(frozen=True)
class Found:
    """One call of attention. kind: ``"sdpa"``, ``"mha"`` (`nn.MultiheadAttention`), ``"written"``
    (softmax of QK^T, times V), or ``"other"``: a softmax of something else, times a matrix.
    pairs: elements of the attention matrix, keys: its columns, queries: its
    rows; None for ``"mha"``."""

    module: str
    owner: str
    kind: str
    pairs: int | None
    keys: int | None
    queries: int | None

    @property
    def between_tokens(self) -> bool:
        return self.kind != "other" and self.owner not in NOT_TOKENS


@dataclass(frozen=True)
class Running:
    """A module that is running. call: tells its calls apart. bare: without layers of its own, such
    as a softmax."""

    name: str
    owner: str
    call: int
    bare: bool


@dataclass(frozen=True)
class Mark:
    """What a tensor was made of, during which call of a module: scores meet their values there."""

    kind: str
    call: int


class Watch(TorchFunctionMode):
    """Marks products, and the softmaxes of products, and notes where they meet a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Running] = []
        self.found: list[Found] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands = [*_tensors(args), *_tensors(kwargs.values())]
        name = getattr(func, "__name__", "")
        known = [m for x in operands if (m := self.mark(x))]
        mark = self.marked(name, operands, {m.kind for m in known})
        home = min((m.call for m in known), default=self.home())  # a layer inside may mix scores
        for tensor in _tensors([out]):
            if mark is not None or hasattr(tensor, "_softmax_mark"):
                made = None if mark is None else Mark(mark, home)
                tensor._softmax_mark = made  # type: ignore[attr-defined]
        return out

    def marked(self, name: str, operands: list[Tensor], marks: set[str]) -> str | None:
        """What becomes of the marks of an operation's operands; attention is noted."""
        mark = next((m for m in (WEIGHTS, PRODUCT, OTHER) if m in marks), None)
        if name == "scaled_dot_product_attention":
            self.note("sdpa", (*operands[0].shape[:-1], operands[1].shape[-2]))
            return None
        if name == "multi_head_attention_forward":
            self.note("mha", None)
            return None
        if name in _SOFTMAXES:
            return WEIGHTS if mark in (PRODUCT, WEIGHTS) else OTHER
        if name not in _MATMULS:
            return None if name in _ENDS else mark
        if mark in (WEIGHTS, OTHER):
            weights = next(x for x in operands if (m := self.mark(x)) and m.kind == mark)
            kind = "written" if mark == WEIGHTS else "other"
            self.note(kind, weights.shape)
            return None
        return PRODUCT if _activations(operands) else None

    def mark(self, tensor: Tensor) -> Mark | None:
        """The tensor's mark, while the module that made it runs."""
        found: Mark | None = getattr(tensor, "_softmax_mark", None)
        alive = found is not None and any(r.call == found.call for r in self.stack)
        return found if alive else None

    def home(self) -> int:
        return next((r.call for r in reversed(self.stack) if not r.bare), 0)

    def note(self, kind: str, shape: Sequence[int] | None) -> None:
        """An attention matrix of this shape, met in the innermost module."""
        top = self.stack[-1]
        sizes = (None, None, None) if shape is None else (math.prod(shape), shape[-1], shape[-2])
        self.found.append(Found(top.name, top.owner, kind, *sizes))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _activations(operands: list[Tensor]) -> bool:
    return sum(not isinstance(x, nn.Parameter) for x in operands) >= 2


@contextmanager
def _names(model: nn.Module, stack: list[Running]) -> Iterator[None]:
    """Keep the innermost running module on top of the stack."""
    names = {module: name for name, module in model.named_modules()}
    calls = count(1)

    def enter(module: nn.Module, args: Any) -> None:
        bare = not any(True for _ in module.children()) and not module._parameters
        name = names.get(module, "")
        stack.append(Running(name, type(module).__name__, next(calls), bare))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_of(model: nn.Module, run: Callable[[], Any]) -> list[Found]:
    """Every attention call while ``run()`` runs the model (on the meta device, say)."""
    watch = Watch()
    with torch.no_grad(), _names(model, watch.stack), watch:
        run()
    return watch.found
