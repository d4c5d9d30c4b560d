"""SkipAt: the attention output of an earlier block, changed a little, in place of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import (
    AttentionInputs,
    InvalidType,
    LearnedPlanner,
    Pattern,
    Planner,
    Site,
    Strategy,
)

from . import _tables as tables

OUTPUT = "output"


@dataclass(frozen=True)
class SkipAt(Strategy):
    """Layers without QK^T and AV: the output of the layer before them, through a small function.

    layers: indices of the sites that skip attention; None for those from a quarter to three
    quarters of the depth, 3 to 8 of 12 as in the paper. parametric: change the patch tokens by the
    paper's function (two linear layers around a depth-wise 5 x 5 convolution, and a channel gate),
    added to what comes in and zero at first; False passes the output on as it is, which learns and
    costs nothing. Prefix rows are always passed on. A site that finds no output of its own shape
    (the first of a stage, fewer tokens) attends.

    >>> SkipAt(layers=[2, 1]).to_dict()["options"]["layers"]
    [1, 2]
    """

    name = "skipat"
    # of the tiny ViT of the suites: nobody reads the queries, keys and values of its second block
    suite = MappingProxyType({"unread": ("blocks.1.attn.qkv", "blocks.1.norm1")})
    paper = "https://arxiv.org/abs/2301.02240"
    fidelity = (
        "inspired by: what is reused is the output before the host's own output projection, which "
        "still runs, as do the projections to queries, keys and values, although nobody reads "
        "them; the function's result is added to its input, so that it starts as the identity"
    )
    needs_training = True
    exact_at_full = False
    inexact_reason = "there is no budget: the listed layers never attend"
    selects_keys = False
    uses_cross_layer_state = True

    layers: tuple[int, ...] | list[int] | None = None
    parametric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tables.layer_indices(self.name, self.layers))
        if not isinstance(self.parametric, bool):
            raise InvalidType(f"parametric must be True or False, got {self.parametric!r}")

    def planner(self, site: Site) -> Planner:
        depth = site.depth
        layers = tuple(self.layers or range(max(1, depth // 4), math.ceil(3 * depth / 4)))
        tables.check_depth(self.name, layers, site)
        reads, keeps = site.index in layers, site.index + 1 in layers
        if not (reads or keeps):
            return Attend()
        return SkipPlanner(reads, keeps, site) if self.parametric else Skip(reads, keeps)


@dataclass(frozen=True)
class Attend:
    """A planner of a site that neither skips attention nor is looked at."""

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return Pattern.dense(inputs.n_queries, inputs.n_keys)


@dataclass(frozen=True)
class Skip(Attend):
    """The identity. reads: whether this site skips attention; keeps: whether the next one does."""

    reads: bool
    keeps: bool

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        found = self.found(inputs)
        return super().__call__(inputs) if found is None else Pattern.output(inputs, found)

    def found(self, inputs: AttentionInputs) -> Tensor | None:
        """The output of the site before, ``[B, H, Nq, Dv]``, if it is to be used and fits."""
        shape = (*inputs.q.shape[:3], inputs.v.shape[-1])
        return inputs.load(OUTPUT, shape) if self.reads else None

    def after(self, inputs: AttentionInputs, output: Tensor) -> None:
        if self.keeps:
            inputs.store(OUTPUT, output)


class SkipPlanner(LearnedPlanner):
    """The function of one site, over the C channels of all its heads; none where a site attends."""

    differentiable = True

    def __init__(self, reads: bool, keeps: bool, site: Site) -> None:
        super().__init__()
        self.role = Skip(reads, keeps)
        if not reads:
            return
        draw = torch.Generator().manual_seed(site.index)
        channels = site.heads * site.value_dim
        self.widen = _drawn((2 * channels, channels), draw)
        self.widen_bias = _zeros(2 * channels)
        self.kernel = _drawn((2 * channels, 1, 5, 5), draw)
        self.kernel_bias = _zeros(2 * channels)
        self.narrow = _zeros(channels, 2 * channels)
        self.narrow_bias = _zeros(channels)
        self.gate = _drawn((1, 1, 3), draw)

    def forward(self, inputs: AttentionInputs) -> Pattern:
        found = self.role.found(inputs)
        if found is None:
            return Attend()(inputs)
        return Pattern.output(inputs, self.change(found, inputs))

    def after(self, inputs: AttentionInputs, output: Tensor) -> None:
        self.role.after(inputs, output)

    def change(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """The function, ``[B, H, Nq, Dv]`` to the same; prefix rows as they are."""
        heads, first = x.shape[1], inputs.prefix
        tokens = x[..., first:, :].transpose(1, 2).flatten(2)
        wide = F.gelu(F.linear(tokens, self._as(self.widen, x), self._as(self.widen_bias, x)))
        image = wide.mT.unflatten(-1, inputs.query_grid)
        kernel, bias = self._as(self.kernel, x), self._as(self.kernel_bias, x)
        image = F.gelu(F.conv2d(image, kernel, bias, padding=2, groups=len(kernel)))
        wide = image.flatten(2).mT
        out = F.linear(wide, self._as(self.narrow, x), self._as(self.narrow_bias, x))
        gate = F.conv1d(out.mean(1, keepdim=True), self._as(self.gate, x), padding=1).sigmoid()
        changed = (tokens + out * gate).unflatten(-1, (heads, -1)).transpose(1, 2)
        return torch.cat([x[..., :first, :], changed], dim=-2)

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the passed on output; zero where the site attends."""
        found, exact = self.role.found(inputs), inputs.attention()
        if found is None:
            self.role.after(inputs, exact)
            return exact.new_zeros(())
        changed = self.change(found, inputs)
        self.role.after(inputs, changed)
        return tables.distance(changed, exact)

    @staticmethod
    def _as(weight: Tensor, x: Tensor) -> Tensor:
        return weight.to(x.dtype)


def _drawn(shape: tuple[int, ...], draw: torch.Generator) -> nn.Parameter:
    """Normal weights of unit gain."""
    scale = math.sqrt(math.prod(shape[1:]))
    return nn.Parameter(torch.randn(shape, generator=draw) / scale, requires_grad=False)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)
