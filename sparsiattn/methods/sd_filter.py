"""A key filter trained by self-distillation: one list of keys for all queries of a call."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import AttentionInputs, InvalidOption, LearnedPlanner, Pattern, Site, Strategy

ROWS = 256  # of exact attention that the loss holds at once


@dataclass(frozen=True)
class SDFilter(Strategy):
    """Keys by a small scorer that learns how much attention each of them receives.

    ``s_j = a_h (mean_i q_i) . k_j * scale + W2 GELU(W1 LN(k_j))_h`` for head h, where W1 reads the
    keys of all heads. Its teacher is the layer's own dense attention: `calibrate` lowers ``KL(m ||
    softmax(s))`` for the received mass ``m_j = mean_i A_ij`` over patch queries. No labels, no
    other network, no table over tokens, so any resolution and any tokens will do. W2 starts at zero
    and ``a`` at one: before training, keys are those that the mean query attends to most.

    k: keys kept, as a share of all or a count, prefix keys included. width: hidden channels of the
    scorer. shared: one list for all heads, by their mean mass. tile: ``"auto"`` is one tile as
    large as the grid, so that kernels load one list of keys; with a host's mask that forbids keys
    (shifted windows, padding) each query takes the best of those it may see. Predictor MACs: ``Nk
    H (D + D width + width)``. The source is a self-distillation attention module for motion
    prediction (IEEE), which filters a sparse interaction graph; it has no public text to link to.

    >>> from sparsiattn.testing.hosts import random_inputs
    >>> inputs = random_inputs((4, 4), prefix=1)
    >>> planner = SDFilter(k=5).planner(inputs.site)
    >>> planner.scores(inputs).shape  # [B, H, Nk]
    torch.Size([2, 3, 17])
    """

    name = "sd_filter"
    fidelity = (
        "inspired by: only the abstract of the self-distilled filter for motion prediction is "
        "public; scorer, teacher and loss are this library's"
    )
    needs_training = True

    k: float = 0.25
    width: int = 16
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.width) is not int or not 0 < self.width < 2**31:
            raise InvalidOption(f"width must be an int >= 1 (below 2**31), got {self.width!r}")
        if not isinstance(self.shared, bool):
            raise InvalidOption(f"shared must be True or False, got {self.shared!r}")

    def resolve_for(self, site: Site, position: int, count: int) -> Strategy:
        """One tile as large as the site's grid, where every query may see every key."""
        one = super().resolve_for(site, position, count)
        if self.tile != "auto":
            return one
        return replace(one, tile=1 if site.bias == "mask" else site.grid)

    def planner(self, site: Site) -> SDFilterPlanner:
        return SDFilterPlanner(self, site)


class SDFilterPlanner(LearnedPlanner):
    """The scorer of one site. gain: ``[H]``; hide: ``[r, H D]``; show: ``[H, r]``."""

    def __init__(self, strategy: SDFilter, site: Site) -> None:
        super().__init__()
        self.strategy = strategy
        generator = torch.Generator().manual_seed(zlib.crc32(site.name.encode()))
        channels = site.heads * site.head_dim
        hide = torch.randn(strategy.width, channels, generator=generator) * channels**-0.5
        self.gain = nn.Parameter(torch.ones(site.heads), requires_grad=False)
        self.hide = nn.Parameter(hide, requires_grad=False)
        self.show = nn.Parameter(torch.zeros(site.heads, strategy.width), requires_grad=False)

    def forward(self, inputs: AttentionInputs) -> Pattern:
        scores = self.log_shares(inputs)
        if self.strategy.shared:
            scores = scores.exp().mean(1, keepdim=True)
        tiles = inputs.tiles
        rows = inputs.n_queries - inputs.prefix if tiles is None else tiles.count
        return Pattern.top(scores.unsqueeze(-2).expand(-1, -1, rows, -1), self.strategy.k)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Logits of every key's share of the attention, ``[B, H, Nk]``."""
        k = inputs.k
        seen = (inputs.mean_query @ k.mT).squeeze(-2) * inputs.scale
        channels = k.transpose(1, 2).flatten(2)
        hidden = F.linear(F.layer_norm(channels, channels.shape[-1:]), self.hide.to(k.dtype))
        learned = F.linear(F.gelu(hidden), self.show.to(hidden.dtype)).mT
        return seen * self.gain.to(seen.dtype)[:, None] + learned

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Kullback-Leibler divergence of the predicted shares from the mass that keys receive."""
        shares = F.kl_div(self.log_shares(inputs), received(inputs), reduction="none")
        return shares.sum(-1).mean()

    def log_shares(self, inputs: AttentionInputs) -> Tensor:
        """Predicted log share of every key, ``[B, H, Nk]`` float32; keys that no query sees get
        next to nothing."""
        scores, seen = self.scores(inputs).float(), inputs.visible_keys
        return (scores if seen is None else scores.masked_fill(~seen, -1e4)).log_softmax(-1)


@torch.no_grad()
def received(inputs: AttentionInputs) -> Tensor:
    """The mass that every key receives from the patch queries in dense attention, their mean,
    ``[B, H, Nk]`` float32; queries that are padding do not count."""
    seen = inputs.visible_keys if inputs.n_queries == inputs.n_keys else None
    total = inputs.q.new_zeros((*inputs.q.shape[:2], inputs.n_keys), dtype=torch.float)
    for rows in torch.arange(inputs.prefix, inputs.n_queries, device=inputs.q.device).split(ROWS):
        part = inputs.logits(rows).float().softmax(-1).nan_to_num(0.0)
        if seen is not None:
            part = part * seen[..., rows, None]
        total = total + part.sum(-2)
    return total / total.sum(-1, keepdim=True).clamp_min(1e-6)
