"""What methods share that compute their own keys, logits or outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, LearnedPlanner, Pattern, Site, Strategy


class ComputedPlanner(LearnedPlanner):
    """Base of planners that learn and choose no keys, so that losses reach their weights."""

    differentiable = True

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the output against dense attention."""
        return relative_error(inputs.attention(self(inputs)), inputs.attention())


class MixedKeysPlanner(ComputedPlanner):
    """Base of planners whose keys are mixtures of the host's, behind the prefix keys as they are.

    Attributes:
        prefix_keys: Prefix keys that every query attends to.
    """

    def __init__(self, strategy: Strategy, site: Site) -> None:
        super().__init__()
        self.name = strategy.name
        self.prefix_keys = site.prefix_tokens if strategy.prefix_keys else 0
        self.refuse_mask(site, site.bias == "mask")

    def refuse_mask(self, site: Site, forbids: bool) -> None:
        """Keys that a host's mask forbids to some queries cannot be mixed with others."""
        if forbids:
            raise InvalidOption(
                f"{self.name!r} mixes keys, and at site {site.name!r} the host's mask forbids some "
                "of them (shifted windows, padding): leave such sites out with sites="
            )

    def pattern(
        self, inputs: AttentionInputs, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Pattern:
        """Attention to the prefix keys and to mixtures ``k``, ``v`` and their ``bias``."""
        count = self.prefix_keys
        if count:
            k = torch.cat([inputs.k[..., :count, :], k], dim=-2)
            v = torch.cat([inputs.v[..., :count, :], v], dim=-2)
        if count and bias is not None:
            host = host_bias(inputs)
            prefix = bias.new_zeros(1, 1, 1, count) if host is None else host[..., :count]
            lead = torch.broadcast_shapes(prefix.shape[:-1], bias.shape[:-1])
            bias = torch.cat([x.to(bias.dtype).expand(*lead, -1) for x in (prefix, bias)], dim=-1)
        return Pattern.computed_keys(inputs, k, v, bias=bias)


def host_bias(inputs: AttentionInputs) -> Tensor | None:
    """The host's bias for the patch queries, ``[B|1, H|1, n|1, Nk]``."""
    bias = inputs.bias
    return bias if bias is None or bias.shape[-2] == 1 else bias[..., inputs.prefix :, :]


def relative_error(output: Tensor, exact: Tensor) -> Tensor:
    """Mean squared difference, relative to the mean square of ``exact``, a scalar."""
    exact = exact.detach().float()
    return (output.float() - exact).square().mean() / exact.square().mean().clamp_min(1e-12)


@dataclass(frozen=True)
class ReusingStrategy(Strategy):
    """Base of strategies whose listed sites use what the site before them computed.

    Args:
        layers: Indices of those sites; None for `default_layers`.
    """

    exact_at_full = False
    selects_keys = False
    uses_cross_layer_state = True

    layers: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        layers = self.layers if isinstance(self.layers, (tuple, list)) else ()
        if not layers or not all(type(layer) is int and layer >= 1 for layer in layers):
            raise InvalidOption(
                f"layers of {self.name!r} must be None or site indices >= 1 (the first site has "
                f"nothing to reuse), got {self.layers!r}"
            )
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    def default_layers(self, depth: int) -> Sequence[int]:
        """Sites of a model of so many that reuse where ``layers`` is None, ascending."""
        raise NotImplementedError(f"{type(self).__name__} must override default_layers(depth)")

    def reads_and_writes(self, site: Site) -> tuple[bool, bool]:
        """Whether ``site`` uses what the site before left, and whether the next one uses its."""
        layers = self.layers or self.default_layers(site.depth)
        if layers and layers[-1] >= site.depth:
            raise InvalidOption(
                f"layers of {self.name!r} name site {layers[-1]}, and the model has {site.depth} "
                f"(0 to {site.depth - 1})"
            )
        return site.index in layers, site.index + 1 in layers


@dataclass(frozen=True)
class Role:
    """A planner that attends; subclasses do something with the tensor that sites pass on.

    Attributes:
        reads: Whether this site uses what the site before it left.
        writes: Whether the next site will use what this one leaves.
    """

    tensor_name: ClassVar[str] = ""

    reads: bool
    writes: bool

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return Pattern.dense(inputs.n_queries, inputs.n_keys)

    def load(self, inputs: AttentionInputs, width: int) -> Tensor | None:
        """What the site before left, ``[B, H, Nq, width]``, if it is to be used and fits."""
        return inputs.load(self.tensor_name, (*inputs.q.shape[:3], width)) if self.reads else None

    def store(self, inputs: AttentionInputs, tensor: Tensor) -> None:
        """Leaves a tensor for the next site, if that uses it."""
        if self.writes:
            inputs.store(self.tensor_name, tensor)
