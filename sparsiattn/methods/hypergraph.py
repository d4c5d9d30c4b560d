"""Attention through hyperedges, after HGFormer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import (
    AttentionInputs,
    InvalidOption,
    LearnedPlanner,
    Pattern,
    Site,
    Strategy,
)

from . import _tables as tables


@dataclass(frozen=True)
class Hypergraph(Strategy):
    """Tokens attend to hyperedges, which have attended to tokens (HGFormer, CS-KNN).

    k: hyperedges, as a share of all keys or a count; prefix keys come on top, within the budget.
    Their centres are the patches that the CLS query (else the mean query) sees best. members: so
    many patches, the nearest by the product of their keys, join each centre. Node to edge: an
    edge's mean query attends to all patches, mixed with the mean of its members' values. Edge to
    node: patch queries attend to the edges' mean keys, those that they belong to favoured.

    >>> Hypergraph(k=0.25).to_dict()["options"]["members"]
    8
    """

    name = "hypergraph"
    paper = "https://arxiv.org/abs/2504.02440"
    fidelity = (
        "inspired by (details of the layers could not be confirmed): the host's own queries, keys "
        "and values stand for the paper's projections, its residuals and activations become a "
        "learned mixture that starts at one half, and incidence a learned logit"
    )
    needs_training = True
    selects_keys = False

    k: float = 0.25
    members: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.members) is not int or self.members < 1:
            raise InvalidOption(f"members must be an int >= 1, got {self.members!r}")

    def planner(self, site: Site) -> HypergraphPlanner:
        return HypergraphPlanner(self, site)


class HypergraphPlanner(LearnedPlanner):
    """What one site learns. values: ``[Dv, Dv]`` map of mean values, at first the identity; mixture
    and incidence: scalars."""

    differentiable = True

    def __init__(self, strategy: Hypergraph, site: Site) -> None:
        super().__init__()
        tables.refuse_mask(strategy.name, site, site.bias == "mask")
        if site.tokens != site.keys:
            raise InvalidOption(
                f"{strategy.name!r} needs queries and keys of the same tokens, and site "
                f"{site.name!r} has {site.tokens} queries for {site.keys} keys: leave it out with "
                "sites="
            )
        self.strategy = strategy
        self.own = site.prefix_tokens if strategy.prefix_keys else 0
        self.values = nn.Parameter(torch.eye(site.value_dim), requires_grad=False)
        self.mixture = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.incidence = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, inputs: AttentionInputs) -> Pattern:
        tables.refuse_mask("hypergraph", inputs.site, inputs.allowed() is not None)
        first, own = inputs.prefix, self.own
        keys, values = inputs.k[..., first:, :], inputs.v[..., first:, :]
        nodes = hyperedges(inputs, self._edges(inputs), self.strategy.members)
        edge_q, edge_k, mean = (_mean_of(x, nodes) for x in (inputs.patch_queries, keys, values))
        seen = F.scaled_dot_product_attention(edge_q, keys, values, scale=inputs.scale)
        share = self.mixture.sigmoid().to(seen.dtype)
        edge_v = share * (mean @ self.values.to(mean.dtype)) + (1 - share) * seen
        k = torch.cat([inputs.k[..., :own, :], edge_k], dim=-2)
        v = torch.cat([inputs.v[..., :own, :], edge_v], dim=-2)
        return Pattern.computed_keys(inputs, k, v, bias=self._bias(inputs, nodes))

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the output against dense attention."""
        return tables.output_loss(self(inputs), inputs)

    def _edges(self, inputs: AttentionInputs) -> int:
        patches = inputs.n_keys - inputs.prefix
        return min(patches, max(1, tables.count(self.strategy.k, inputs.n_keys) - self.own))

    def _bias(self, inputs: AttentionInputs, nodes: Tensor) -> Tensor:
        """Log of the patches for each edge, incidence, and the mean of the host's bias over its
        members: ``[B, H|1, n, own + E]``."""
        patches, (batch, edges, size) = inputs.n_keys - inputs.prefix, nodes.shape
        empty = inputs.q.new_zeros(batch, edges, patches)
        joins = empty.scatter(2, nodes, 1.0).mT.unsqueeze(1)
        each = inputs.q.new_full((), patches / edges).log()
        bias = each + self.incidence.to(joins.dtype) * joins
        host = tables.host_bias(inputs)
        if host is None:
            return F.pad(bias, (self.own, 0))
        host = host.to(joins.dtype)
        bias = bias + host[..., inputs.prefix :] @ (joins / size)
        return tables.join([host[..., : self.own], bias])


def hyperedges(inputs: AttentionInputs, edges: int, members: int) -> Tensor:
    """The patches of every hyperedge, the same for all heads: ``[B, E, m]``."""
    keys = inputs.k[..., inputs.prefix :, :]
    asks = inputs.q[..., :1, :] if inputs.prefix else inputs.mean_query
    score = (asks @ keys.mT).sum(1).squeeze(1)
    centres = score.topk(edges, dim=-1).indices
    flat = keys.transpose(1, 2).flatten(2)
    middle = flat.gather(1, centres.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
    return (middle @ flat.mT).topk(min(members, keys.shape[-2]), dim=-1).indices


def _mean_of(x: Tensor, nodes: Tensor) -> Tensor:
    """The mean over every hyperedge of ``[B, H, n, D]``: ``[B, H, E, D]``."""
    index = nodes.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    found: Tensor = x.gather(2, index).unflatten(2, nodes.shape[1:])
    return found.mean(3)
