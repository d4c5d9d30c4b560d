"""Hypergraph attention: tokens exchange values through hyperedges, groups of similar patches.

After HGFormer, arXiv 2504.02440.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Site, Strategy, count_of
from sparsiattn.methods._computed import MixedKeysPlanner, host_bias
from sparsiattn.methods._options import check_count
from sparsiattn.methods._weights import frozen


@dataclass(frozen=True)
class Hypergraph(Strategy):
    """Tokens attend to hyperedges, which have attended to tokens (HGFormer, CS-KNN).

    The centres of hyperedges are the patches with the largest scores of the class token's query (or
    the mean query). Node to edge: an edge's mean query attends to all patches, and the result is
    mixed with the mean of its members' values. Edge to node: patch queries attend to the edges'
    mean keys, with a learned bonus for edges that they belong to.

    Args:
        k: Number of hyperedges, as a share of all keys or a count; the budget includes the prefix
            keys.
        members: Number of patches of each hyperedge: those with the most similar keys to the
            centre.

    >>> Hypergraph(k=0.25).to_dict()["options"]["members"]
    8
    """

    name = "hypergraph"
    paper = "https://arxiv.org/abs/2504.02440"
    fidelity = (
        "inspired by (details of the layers could not be confirmed): the model's own queries, keys "
        "and values replace the paper's projections, a learned mixture that starts at one half "
        "replaces its residuals and activations, and incidence is a learned logit"
    )
    needs_training = True
    selects_keys = False

    k: float = 0.25
    members: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("members", self.members)

    def planner(self, site: Site) -> HypergraphPlanner:
        return HypergraphPlanner(self, site)


class HypergraphPlanner(MixedKeysPlanner):
    """The learned weights of one site.

    Attributes:
        values: ``[Dv, Dv]``, map of mean values, initially the identity.
        mixture: Scalar; its sigmoid is the share of mapped means in an edge's value.
        incidence: Scalar, added to the logit of an edge that a query belongs to.
    """

    def __init__(self, strategy: Hypergraph, site: Site) -> None:
        super().__init__(strategy, site)
        if site.tokens != site.keys:
            raise InvalidOption(
                f"{strategy.name!r} needs queries and keys of the same tokens, but site "
                f"{site.name!r} has {site.tokens} queries and {site.keys} keys: exclude it with "
                "sites="
            )
        self.strategy = strategy
        self.values = frozen(torch.eye(site.value_dim))
        self.mixture = frozen(torch.zeros(()))
        self.incidence = frozen(torch.ones(()))

    def forward(self, inputs: AttentionInputs) -> Pattern:
        self.refuse_mask(inputs.site, inputs.allowed() is not None)
        keys, values = (x[..., inputs.prefix :, :] for x in (inputs.k, inputs.v))
        nodes = hyperedges(inputs, self._edges(inputs), self.strategy.members)
        edge_q, edge_k, mean = (_mean_of(x, nodes) for x in (inputs.patch_queries, keys, values))
        attended = F.scaled_dot_product_attention(edge_q, keys, values, scale=inputs.scale)
        share = self.mixture.sigmoid().to(attended.dtype)
        edge_v = share * (mean @ self.values.to(mean.dtype)) + (1 - share) * attended
        return self.pattern(inputs, edge_k, edge_v, self._bias(inputs, nodes))

    def _edges(self, inputs: AttentionInputs) -> int:
        patches = inputs.n_keys - inputs.prefix
        keys = count_of(self.strategy.budget_for(inputs.n_keys), inputs.n_keys)
        budget = keys - self.prefix_keys
        return min(patches, max(1, budget))

    def _bias(self, inputs: AttentionInputs, nodes: Tensor) -> Tensor:
        """Bias of the hyperedges, ``[B, H|1, n, E]``.

        It is the sum of the log of the number of patches per edge, the incidence, and the mean of
        the host's bias over the edge's members.
        """
        patches, (batch, edges, size) = inputs.n_keys - inputs.prefix, nodes.shape
        empty = inputs.q.new_zeros(batch, edges, patches)
        joins = empty.scatter(2, nodes, 1.0).mT.unsqueeze(1)
        log_size = inputs.q.new_full((), patches / edges).log()
        bias = log_size + self.incidence.to(joins.dtype) * joins
        host = host_bias(inputs)
        if host is None:
            return bias
        return bias + host[..., inputs.prefix :].to(joins.dtype) @ (joins / size)


def hyperedges(inputs: AttentionInputs, edges: int, members: int) -> Tensor:
    """The patches of every hyperedge, ``[B, E, m]``, shared by all heads."""
    keys = inputs.k[..., inputs.prefix :, :]
    query = inputs.q[..., :1, :] if inputs.prefix else inputs.mean_query
    score = (query @ keys.mT).sum(1).squeeze(1)
    centres = score.topk(edges, dim=-1).indices
    joined_heads = keys.transpose(1, 2).flatten(2)
    index = centres.unsqueeze(-1).expand(-1, -1, joined_heads.shape[-1])
    similarity = joined_heads.gather(1, index) @ joined_heads.mT
    return similarity.topk(min(members, keys.shape[-2]), dim=-1).indices


def _mean_of(x: Tensor, nodes: Tensor) -> Tensor:
    """The mean of ``x`` ``[B, H, n, D]`` over the members of every hyperedge: ``[B, H, E, D]``."""
    index = nodes.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    members: Tensor = x.gather(2, index).unflatten(2, nodes.shape[1:])
    return members.mean(3)
