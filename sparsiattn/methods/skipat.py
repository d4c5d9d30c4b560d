"""SkipAt: a function of an earlier block's attention output replaces attention.

Skip-Attention, arXiv 2301.02240.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import AttentionInputs, LearnedPlanner, Pattern, Planner, Site
from sparsiattn.methods._computed import ReusingStrategy, Role, relative_error
from sparsiattn.methods._options import check_flag
from sparsiattn.methods._weights import frozen


@dataclass(frozen=True)
class SkipAt(ReusingStrategy):
    """Layers without QK^T and AV: a small function of the previous layer's output replaces them.

    The function is the paper's (two linear layers around a depth-wise 5 x 5 convolution, and a
    channel gate), applied to the patch tokens. Its result is added to its input and is zero at
    first. Prefix rows are passed on unchanged. A site without an earlier output of its own shape
    (the first of a stage, or after a reduction of tokens) attends.

    Args:
        layers: Indices of the sites that skip attention; None for those from a quarter to three
            quarters of the depth, 3 to 8 of 12 as in the paper.
        parametric: Whether to apply the function; False passes the output on unchanged, without
            learning or cost.

    >>> SkipAt(layers=[2, 1]).to_dict()["options"]["layers"]
    [1, 2]
    """

    name = "skipat"
    # in the suites' tiny ViT, queries, keys and values of the second block are not used
    suite = MappingProxyType({"unread": ("blocks.1.attn.qkv", "blocks.1.norm1")})
    paper = "https://arxiv.org/abs/2301.02240"
    fidelity = (
        "inspired by: the output before the model's output projection is reused, and that "
        "projection still runs, as do the unused projections to queries, keys and values; the "
        "function's result is added to its input, so that it starts as the identity"
    )
    needs_training = True
    needs_grid = True
    inexact_reason = "there is no budget: the listed layers never attend"

    parametric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("parametric", self.parametric)

    def default_layers(self, depth: int) -> Sequence[int]:
        return range(max(1, depth // 4), math.ceil(3 * depth / 4))

    def planner(self, site: Site) -> Planner:
        reads, writes = self.reads_and_writes(site)
        if not (reads or writes):
            return Role(reads, writes)
        role = OutputRole(reads, writes)
        return SkipPlanner(role, site) if self.parametric else role


@dataclass(frozen=True)
class OutputRole(Role):
    """A planner that passes the output on unchanged."""

    tensor_name = "output"

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        earlier = self.earlier_output(inputs)
        return super().__call__(inputs) if earlier is None else Pattern.output(inputs, earlier)

    def earlier_output(self, inputs: AttentionInputs) -> Tensor | None:
        """The previous site's output, ``[B, H, Nq, Dv]``; None if unused or of another shape."""
        return self.load(inputs, inputs.v.shape[-1])

    def after(self, inputs: AttentionInputs, output: Tensor) -> None:
        """Store the site's output for the next one."""
        self.store(inputs, output)


class SkipPlanner(LearnedPlanner):
    """The function of one site, over the C channels of all its heads; empty if the site attends.

    Attributes:
        widen: ``[2 C, C]``, with ``widen_bias`` ``[2 C]``.
        kernel: ``[2 C, 1, 5, 5]``, with ``kernel_bias`` ``[2 C]``.
        narrow: ``[C, 2 C]``, with ``narrow_bias`` ``[C]``.
        gate: ``[1, 1, 3]``, a convolution along the channels.
    """

    differentiable = True

    def __init__(self, role: OutputRole, site: Site) -> None:
        super().__init__()
        self.role = role
        if not role.reads:
            return
        random = torch.Generator().manual_seed(site.index)
        channels = site.heads * site.value_dim
        self.widen = _unit_gain((2 * channels, channels), random)
        self.widen_bias = frozen(torch.zeros(2 * channels))
        self.kernel = _unit_gain((2 * channels, 1, 5, 5), random)
        self.kernel_bias = frozen(torch.zeros(2 * channels))
        self.narrow = frozen(torch.zeros(channels, 2 * channels))
        self.narrow_bias = frozen(torch.zeros(channels))
        self.gate = _unit_gain((1, 1, 3), random)

    def forward(self, inputs: AttentionInputs) -> Pattern:
        earlier = self.role.earlier_output(inputs)
        if earlier is None:
            return self.role(inputs)
        return Pattern.output(inputs, self.transform(earlier, inputs))

    def after(self, inputs: AttentionInputs, output: Tensor) -> None:
        """Store the site's output for the next one."""
        self.role.after(inputs, output)

    def transform(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Apply the function to ``[B, H, Nq, Dv]``; prefix rows are unchanged."""

        def cast(*weights: Tensor) -> list[Tensor]:
            return [weight.to(x.dtype) for weight in weights]

        prefix = inputs.prefix
        tokens = x[..., prefix:, :].transpose(1, 2).flatten(2)
        wide = F.gelu(F.linear(tokens, *cast(self.widen, self.widen_bias)))
        image = wide.mT.unflatten(-1, inputs.query_grid)
        kernel, bias = cast(self.kernel, self.kernel_bias)
        image = F.gelu(F.conv2d(image, kernel, bias, padding=2, groups=len(kernel)))
        out = F.linear(image.flatten(2).mT, *cast(self.narrow, self.narrow_bias))
        gate = F.conv1d(out.mean(1, keepdim=True), self.gate.to(x.dtype), padding=1).sigmoid()
        changed = (tokens + out * gate).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return torch.cat([x[..., :prefix, :], changed], dim=-2)

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the reused output; zero if the site attends."""
        earlier, exact = self.role.earlier_output(inputs), inputs.attention()
        output = exact if earlier is None else self.transform(earlier, inputs)
        self.role.after(inputs, output)
        return exact.new_zeros(()) if earlier is None else relative_error(output, exact)


def _unit_gain(shape: tuple[int, ...], random: torch.Generator) -> nn.Parameter:
    """Normally distributed weights with unit gain."""
    return frozen(torch.randn(shape, generator=random) / math.sqrt(math.prod(shape[1:])))
