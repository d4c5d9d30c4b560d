"""Base classes of methods that compute their own keys, logits or outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, LearnedPlanner, Pattern, Site, Strategy


class ComputedPlanner(LearnedPlanner):
    """Base of learned planners that select no keys, so that any loss reaches their weights."""

    differentiable = True

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the output against dense attention."""
        return relative_error(inputs.attention(self(inputs)), inputs.attention())


class MixedKeysPlanner(ComputedPlanner):
    """Base of planners whose keys are mixtures of the host's patch keys, after the prefix keys.

    Attributes:
        prefix_keys: Number of prefix keys that every query attends to.
    """

    def __init__(self, strategy: Strategy, site: Site) -> None:
        super().__init__()
        self.name = strategy.name
        self.prefix_keys = site.prefix_tokens if strategy.prefix_keys else 0
        self.refuse_mask(site, site.bias == "mask")

    def refuse_mask(self, site: Site, forbids: bool) -> None:
        """Raise `InvalidOption` if the host masks keys, as masked keys cannot be mixed."""
        if forbids:
            raise InvalidOption(
                f"{self.name!r} mixes keys, but at site {site.name!r} the host masks some of them "
                "(shifted windows, padding): exclude such sites with sites="
            )

    def pattern(
        self, inputs: AttentionInputs, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Pattern:
        """Attention to the prefix keys and to the mixed keys.

        Args:
            inputs: The call.
            k: Mixed keys, ``[B, H, r, D]``.
            v: Mixed values, ``[B, H, r, Dv]``.
            bias: Bias of the mixed keys, ``[B|1, H|1, n|1, r]``; None for none.
        """
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
    """Base of strategies in which some sites use the result of the previous site.

    Args:
        layers: Indices of the sites that reuse a result; None for `default_layers`.
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
                f"layers of {self.name!r} must be None or site indices >= 1 (the first site has no "
                f"result to reuse), got {self.layers!r}"
            )
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    def default_layers(self, depth: int) -> Sequence[int]:
        """Indices of the sites that reuse a result in a model with ``depth`` sites, ascending."""
        raise NotImplementedError(f"{type(self).__name__} must override default_layers(depth)")

    def reads_and_writes(self, site: Site) -> tuple[bool, bool]:
        """Whether a site uses the previous site's result, and whether the next one uses its own."""
        layers = self.layers or self.default_layers(site.depth)
        if layers and layers[-1] >= site.depth:
            raise InvalidOption(
                f"layers of {self.name!r} must be below {site.depth}, the number of sites of the "
                f"model, got {layers[-1]}"
            )
        return site.index in layers, site.index + 1 in layers


@dataclass(frozen=True)
class Role:
    """A planner of dense attention; subclasses store and reuse a tensor between sites.

    Attributes:
        reads: Whether this site uses the tensor of the previous site.
        writes: Whether the next site uses the tensor of this site.
    """

    tensor_name: ClassVar[str] = ""

    reads: bool
    writes: bool

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return Pattern.dense(inputs.n_queries, inputs.n_keys)

    def load(self, inputs: AttentionInputs, width: int) -> Tensor | None:
        """The previous site's tensor, ``[B, H, Nq, width]``; None if unused or of another shape."""
        return inputs.load(self.tensor_name, (*inputs.q.shape[:3], width)) if self.reads else None

    def store(self, inputs: AttentionInputs, tensor: Tensor) -> None:
        """Store a tensor for the next site, if it uses one."""
        if self.writes:
            inputs.store(self.tensor_name, tensor)
