"""Which modules of a model compute softmax attention, found by running it, without the library:
what the census compares the sites of a patch with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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
# a linear layer mixes heads of scores (talking heads) but ends what else the marks may follow
_ENDS = {"layer_norm", "batch_norm", "group_norm", "rms_norm", "normalize", "linear", "conv2d"}


@dataclass(frozen=True)
class Found:
    """One call of attention. kind: ``"sdpa"``, ``"mha"`` (`nn.MultiheadAttention`), ``"written"``
    (softmax of QK^T, times V), or ``"other"``: a softmax of something else, times a matrix.
    pairs: elements of the attention matrix, None for ``"mha"``."""

    module: str
    owner: str
    kind: str
    pairs: int | None

    @property
    def between_tokens(self) -> bool:
        return self.kind != "other" and self.owner not in NOT_TOKENS


class Watch(TorchFunctionMode):
    """Marks products, and the softmaxes of products, and notes where they meet a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, str]] = []
        self.found: list[Found] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        operands = [*_tensors(args), *_tensors(kwargs.values())]
        marks = {getattr(x, "_softmax_mark", None) for x in operands}
        mark = next((m for m in (WEIGHTS, PRODUCT, OTHER) if m in marks), None)
        if name == "scaled_dot_product_attention" or func is F.scaled_dot_product_attention:
            q, k = operands[0].shape, operands[1].shape
            self.note("sdpa", q[:-1].numel() * k[-2])
            mark = None
        elif func is F.multi_head_attention_forward:
            self.note("mha", None)
            mark = None
        elif name in _SOFTMAXES:
            mark = WEIGHTS if mark in (PRODUCT, WEIGHTS) else OTHER
        elif name in _MATMULS:
            if mark in (WEIGHTS, OTHER):
                weights = [x for x in operands if getattr(x, "_softmax_mark", None) == mark]
                self.note("written" if mark == WEIGHTS else "other", weights[0].numel())
                mark = None
            else:
                mark = PRODUCT if _activations(operands) else None
        elif name in _ENDS and mark not in (PRODUCT, WEIGHTS):
            mark = None
        elif name in _ENDS and name not in ("linear", "conv2d"):
            mark = None
        for tensor in _tensors([out]):
            if mark is not None or hasattr(tensor, "_softmax_mark"):
                tensor._softmax_mark = mark  # type: ignore[attr-defined]
        return out

    def note(self, kind: str, pairs: int | None) -> None:
        module, owner = self.stack[-1] if self.stack else ("", "")
        self.found.append(Found(module, owner, kind, pairs))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _activations(operands: list[Tensor]) -> bool:
    return sum(not isinstance(x, nn.Parameter) for x in operands) >= 2


@contextmanager
def _names(model: nn.Module, stack: list[tuple[str, str]]) -> Iterator[None]:
    """Keep the path and class of the innermost running module on top of the stack."""
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        stack.append((names.get(module, ""), type(module).__name__))

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
