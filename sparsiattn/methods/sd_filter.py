"""A key filter trained by self-distillation: one list of keys for all queries of a call.

After a self-distillation attention module for motion prediction (IEEE), which filters a sparse
interaction graph. Its text is not public, so there is no link.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, InvalidOption, LearnedPlanner, Pattern, Site, Strategy
from sparsiattn.methods._options import check_count, check_flag
from sparsiattn.methods._weights import frozen, generator

ROWS_AT_ONCE = 256
"""Number of rows of exact attention that the loss keeps in memory."""


@dataclass(frozen=True)
class SDFilter(Strategy):
    """Keys by a small scorer that learns how much attention each key receives.

    ``s_j = a_h (mean_i q_i) . k_j * scale + W2 GELU(W1 LN(k_j))_h`` for head h, where W1 reads the
    keys of all heads. The teacher is the layer's own dense attention: `calibrate` minimises ``KL(m
    || softmax(s))`` for the received mass ``m_j = mean_i A_ij`` over patch queries. It needs no
    labels and no other network, and works at any resolution. W2 starts at zero and ``a`` at one:
    before training, it selects the keys that the mean query attends to most.

    Predictor MACs: ``Nk H (D + D width + width)``.

    Args:
        k: Share or count of keys to keep, prefix keys included.
        width: Hidden channels of the scorer.
        shared: Whether all heads share one list, by their mean mass.
        tile: ``"auto"`` is one tile as large as the grid, so that kernels load one list of keys; if
            the host masks keys (shifted windows, padding), each query gets its own list.

    >>> from sparsiattn.testing.hosts import random_inputs
    >>> inputs = random_inputs((4, 4), prefix=1)
    >>> planner = SDFilter(k=5).planner(inputs.site)
    >>> planner.scores(inputs).shape  # [B, H, Nk]
    torch.Size([2, 3, 17])
    """

    name = "sd_filter"
    fidelity = (
        "inspired by: only the abstract of the self-distilled filter for motion prediction is "
        "public; scorer, teacher and loss were designed for this library"
    )
    needs_training = True
    needs_grid = True

    k: float = 0.25
    width: int = 16
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("width", self.width)
        check_flag("shared", self.shared, InvalidOption)

    def resolve_for(self, site: Site, position: int, count: int) -> Strategy:
        """A copy with one tile as large as the site's grid, unless the host masks keys."""
        resolved = super().resolve_for(site, position, count)
        if self.tile != "auto":
            return resolved
        return replace(resolved, tile=1 if site.bias == "mask" else site.grid)

    def planner(self, site: Site) -> SDFilterPlanner:
        return SDFilterPlanner(self, site)


class SDFilterPlanner(LearnedPlanner):
    """The scorer of one site.

    Attributes:
        gain: ``[H]``, factor of the mean query's logits.
        hide: ``[width, H D]``, first layer, on the keys of all heads.
        show: ``[H, width]``, last layer.
    """

    def __init__(self, strategy: SDFilter, site: Site) -> None:
        super().__init__()
        self.strategy = strategy
        channels = site.heads * site.head_dim
        hide = torch.randn(strategy.width, channels, generator=generator(site.name))
        self.gain = frozen(torch.ones(site.heads))
        self.hide = frozen(hide * channels**-0.5)
        self.show = frozen(torch.zeros(site.heads, strategy.width))

    def forward(self, inputs: AttentionInputs) -> Pattern:
        scores = self.log_shares(inputs)
        if self.strategy.shared:
            scores = scores.exp().mean(1, keepdim=True)
        tiles = inputs.tiles
        rows = inputs.n_queries - inputs.prefix if tiles is None else tiles.count
        return Pattern.top(scores.unsqueeze(-2).expand(-1, -1, rows, -1), self.strategy.k)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Logits of the predicted attention share of every key, ``[B, H, Nk]``."""
        k = inputs.k
        mean_logits = (inputs.mean_query @ k.mT).squeeze(-2) * inputs.scale
        channels = k.transpose(1, 2).flatten(2)
        hidden = F.linear(F.layer_norm(channels, channels.shape[-1:]), self.hide.to(k.dtype))
        learned = F.linear(F.gelu(hidden), self.show.to(hidden.dtype)).mT
        return mean_logits * self.gain.to(mean_logits.dtype)[:, None] + learned

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """KL divergence of the predicted shares from the attention mass that keys receive."""
        shares = F.kl_div(self.log_shares(inputs), received(inputs), reduction="none")
        return shares.sum(-1).mean()

    def log_shares(self, inputs: AttentionInputs) -> Tensor:
        """Predicted log share of every key, ``[B, H, Nk]`` float32, about 0 for masked keys."""
        scores, visible = self.scores(inputs).float(), inputs.visible_keys
        return (scores if visible is None else scores.masked_fill(~visible, -1e4)).log_softmax(-1)


@torch.no_grad()
def received(inputs: AttentionInputs) -> Tensor:
    """Mean attention that every key receives from the patch queries, ``[B, H, Nk]`` float32.

    Attention is dense; queries that are padding do not count.
    """
    visible = inputs.visible_keys if inputs.n_queries == inputs.n_keys else None
    total = inputs.q.new_zeros((*inputs.q.shape[:2], inputs.n_keys), dtype=torch.float)
    queries = torch.arange(inputs.prefix, inputs.n_queries, device=inputs.q.device)
    for rows in queries.split(ROWS_AT_ONCE):
        # a row in which every key is masked is NaN
        part = inputs.logits(rows).float().softmax(-1).nan_to_num(0.0)
        if visible is not None:
            part = part * visible[..., rows, None]
        total = total + part.sum(-2)
    return total / total.sum(-1, keepdim=True).clamp_min(1e-6)
