"""Fewer tokens by hand: every block of a model runs on the tokens that are left of one image.

Nothing here is the library's. The MLP treats tokens one by one, so what comes between attention and
MLP is done to the MLP's input, and the block's second sum is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tests.support.by_hand import Recorded, flat, logits_of, recorded


@dataclass
class Sequence:
    """The tokens of one image on their way. prefix, suffix: tokens before and after the patches,
    which stay; n: patches at first; ids: the patch whose position each token has; size: patches
    merged into it; place: where each patch went, -1 if dropped; last: every patch's last value;
    short: the tokens that go on, where whoever called the block was handed every position."""

    prefix: int
    n: int
    suffix: int = 0
    ids: Tensor = field(init=False)
    size: Tensor = field(init=False)
    place: Tensor = field(init=False)
    last: Tensor | None = None
    short: Tensor | None = None

    def __post_init__(self) -> None:
        self.ids, self.size, self.place = (
            torch.arange(self.n),
            torch.ones(self.n),
            torch.arange(self.n),
        )

    def note(self, x: Tensor) -> None:
        """Patch tokens ``[m, C]`` just before some are dropped."""
        values = x.new_zeros(self.n, x.shape[-1]) if self.last is None else self.last.clone()
        there = self.place >= 0
        values[there] = x[self.place[there]]
        self.last = values

    def whole(self, x: Tensor) -> Tensor:
        """Patch tokens ``[m, C]`` at every patch's place; what is gone has its last value."""
        self.note(x)
        assert self.last is not None
        return self.last


Reduce = Callable[[Tensor, Recorded, Sequence], Tensor]
"""Patch tokens ``[n, C]``, the block's attention and the sequence, to the tokens that are left."""


@dataclass(frozen=True)
class Drop:
    """EViT: keep the patches that class tokens attend to most, or where there are none, the mean
    patch query."""

    keep: float
    classes: int

    def __call__(self, x: Tensor, call: Recorded, sequence: Sequence) -> Tensor:
        prefix = sequence.prefix
        rows = slice(0, self.classes)
        if not self.classes:
            mean = call.q[..., prefix:, :].mean(-2, keepdim=True)
            bias = call.mask
            if bias is not None:
                bias = bias[..., prefix:, :].mean(-2, keepdim=True)
            call, rows = Recorded(mean, call.k, bias, call.scale), slice(0, 1)
        weights = flat(logits_of(call))[:, rows].softmax(-1).mean((0, 1))
        weights = weights[prefix : len(weights) - sequence.suffix]
        count = math.ceil(self.keep * len(x))
        kept = weights.argsort(descending=True)[:count].sort().values
        sequence.note(x)
        new = torch.full((len(x),), -1)
        new[kept] = torch.arange(count)
        gone = sequence.place < 0
        sequence.place = torch.where(gone, -1, new[sequence.place.clamp_min(0)])
        sequence.ids, sequence.size = sequence.ids[kept], sequence.size[kept]
        return x[kept]


@dataclass(frozen=True)
class Merge:
    """ToMe, section 3: alternate tokens of the whole sequence are matched by the cosine of their
    keys, the r best edges merge, values are means by size."""

    r: int

    def __call__(self, x: Tensor, call: Recorded, sequence: Sequence) -> Tensor:
        prefix, n = sequence.prefix, len(x)
        r = min(self.r, n // 2)
        keys = call.k.reshape(-1, *call.k.shape[-2:]).mean(0)[prefix:]
        keys = keys / keys.norm(dim=-1, keepdim=True)
        first = [i for i in range(n) if (i + prefix) % 2 == 0]
        second = [i for i in range(n) if (i + prefix) % 2 == 1]
        best = (keys[first] @ keys[second].T).max(-1)
        moving = best.values.argsort(descending=True)[:r].tolist()
        into = {first[a]: second[int(best.indices[a])] for a in moving}
        total, size = x * sequence.size[:, None], sequence.size.clone()
        for a, b in into.items():
            total[b] += total[a]
            size[b] += size[a]
        left = [a for a in first if a not in into] + second
        where = {token: at for at, token in enumerate(left)}
        where |= {a: where[b] for a, b in into.items()}
        sequence.place = torch.tensor([where[int(p)] for p in sequence.place])
        sequence.ids, sequence.size = sequence.ids[left], size[left]
        return total[left] / size[left, None]


class Short(TorchFunctionMode):
    """Attention of fewer tokens: biases cut down to them, keys of a merged token weighing by its
    size, and operands kept for whoever scores tokens."""

    def __init__(self, proportional: bool) -> None:
        super().__init__()
        self.sequence: Sequence | None = None
        self.proportional = proportional
        self.calls: list[Recorded] = []
        self.inside = False  # a block: heads may attend to tokens as well

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.inside or getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        call = recorded(*args, **kwargs)
        mask = self.fitting(call.mask, call.k.shape[-2])
        self.calls.append(Recorded(call.q, call.k, mask, call.scale))
        assert self.sequence is not None
        logits = logits_of(self.calls[-1])
        if self.proportional:
            sizes = torch.cat([torch.ones(self.sequence.prefix), self.sequence.size])
            logits = logits + sizes.log()
        return logits.softmax(-1) @ args[2]

    def fitting(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        assert self.sequence is not None
        prefix, suffix = self.sequence.prefix, self.sequence.suffix
        if mask is None or mask.shape[-1] == tokens:
            return mask
        last = torch.arange(suffix) + prefix + self.sequence.n
        left = torch.cat([torch.arange(prefix), self.sequence.ids + prefix, last])
        return mask[..., left, :][..., left]


class Shortened:
    """A model whose blocks are driven by hand, one image at a time, and its frames or tiles one by
    one. every: whoever reads the output of any block gets every position."""

    def __init__(
        self,
        model: Any,
        blocks: list[Any],
        prefix: int,
        reduce: Reduce,
        suffix: int = 0,
        every: bool = False,
    ) -> None:
        self.model, self.blocks, self.reduce, self.every = model, blocks, reduce, every
        self.prefix, self.suffix = prefix, suffix
        self.short = Short(isinstance(reduce, Merge))
        self.sequences: list[Sequence] = []
        self.in_tuple = False  # blocks of older transformers give a tuple

    def __call__(self, images: Tensor, whole: bool) -> Tensor:
        """The model's output. whole: whether its head gets every position again."""
        return torch.cat(self.outputs(images, whole))

    def outputs(self, images: Tensor, whole: bool) -> list[Any]:
        """What the model gives for each image."""
        found = []
        for image in images:
            with self.driven(whole), self.short:
                found.append(self.model(image[None]))
        return found

    @contextmanager
    def driven(self, whole: bool) -> Iterator[None]:
        try:
            for block in self.blocks:
                last = block is self.blocks[-1]
                block.forward = self.forward(block, type(block).forward, whole and last)
            yield
        finally:
            for block in self.blocks:
                del block.forward
            self.short.sequence = None

    def forward(self, block: Any, host: Any, whole: bool) -> Callable[..., Any]:
        row = self.of_row(block, host, whole or self.every)

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if block is self.blocks[0]:
                patches = x.shape[1] - self.prefix - self.suffix
                self.sequences = [Sequence(self.prefix, patches, self.suffix) for _ in x]
            rows = []
            for i, (sequence, one) in enumerate(zip(self.sequences, x.split(1), strict=True)):
                self.short.sequence = sequence
                its_args, its_kwargs = (_of_row(value, i, len(x)) for value in (args, kwargs))
                rows.append(row(one, *its_args, **its_kwargs))
            return (torch.cat(rows),) if self.in_tuple else torch.cat(rows)

        return run

    def of_row(self, block: Any, host: Any, whole: bool) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            sequence = self.short.sequence
            assert sequence is not None
            x = x if sequence.short is None else sequence.short
            args, kwargs = tuple(map(self.cut, args)), {k: self.cut(v) for k, v in kwargs.items()}
            self.short.calls.clear()
            middle: list[Tensor] = []
            handle = _before_mlp(block, middle)
            self.short.inside = True
            out = host(block, x, *args, **kwargs)
            self.short.inside = False
            self.in_tuple = isinstance(out, tuple)
            out = out[0] if self.in_tuple else out
            handle.remove()
            y = middle[0] if middle else out
            y = self.change(y, lambda x: self.reduce(x, self.short.calls[0], sequence))
            y = y + _mlp(block, y) if middle else y
            if self.every:
                sequence.short = y
            return self.change(y, sequence.whole) if whole else y

        return run

    def change(self, x: Tensor, patches: Callable[[Tensor], Tensor]) -> Tensor:
        """``[1, N, C]`` with other patch tokens."""
        end = x.shape[1] - self.suffix
        changed = patches(x[0, self.prefix : end])
        return torch.cat([x[0, : self.prefix], changed, x[0, end:]])[None]

    def cut(self, value: Any) -> Any:
        """A table of positions among a block's arguments, for the tokens that are left."""
        sequence = self.short.sequence
        assert sequence is not None
        if isinstance(value, tuple):
            return tuple(map(self.cut, value))
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-2] == sequence.n:
            return value[..., sequence.ids, :]
        return value


NORMS_BEHIND = ("post_feedforward_layernorm", "norm4")
NORMS = ("norm3", "norm2", "layernorm_after", "layer_norm2", "pre_feedforward_layernorm")


def _norm(block: Any) -> str:
    """The name of the norm before the MLP."""
    return next((name for name in NORMS if hasattr(block, name)), "")


def _of_row(value: Any, row: int, rows: int) -> Any:
    """A row's part of arguments that have one for each."""
    return tree_map(lambda x: x[row : row + 1] if _has_rows(x, rows) else x, value)


def _has_rows(x: Any, rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() == 3 and x.shape[0] == rows


def _before_mlp(block: Any, middle: list[Tensor]) -> Any:
    """Note the sum between attention and MLP, where the block has one."""
    norm = getattr(block, _norm(block), nn.Identity())
    return norm.register_forward_pre_hook(lambda _, args: middle.append(args[0]))


def _mlp(block: Any, y: Tensor) -> Tensor:
    x = getattr(block, _norm(block))(y)
    branch = block.mlp(x) if hasattr(block, "mlp") else _older_mlp(block, x)
    behind = next((name for name in NORMS_BEHIND if hasattr(block, name)), None)
    if behind is not None:
        return getattr(block, behind)(branch)  # type: ignore[no-any-return]
    scale = getattr(block, "ls2", getattr(block, "layer_scale2", None))
    if scale is not None:
        return scale(branch)  # type: ignore[no-any-return]
    gamma = getattr(block, "gamma_2", getattr(block, "lambda_2", None))
    return branch if gamma is None else gamma * branch


def _older_mlp(block: Any, x: Tensor) -> Tensor:
    """The MLP of older transformers, in two parts; the second may be given a sum to add to."""
    hidden = block.intermediate(x)
    if len(signature(block.output.forward).parameters) == 1:
        return block.output(hidden)  # type: ignore[no-any-return]
    return block.output(hidden, torch.zeros_like(x))  # type: ignore[no-any-return]
