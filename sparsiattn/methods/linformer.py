"""Linformer: keys and values projected along the tokens to a fixed number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsiattn import AttentionInputs, LearnedPlanner, Pattern, Site, Strategy

from . import _tables as tables


@dataclass(frozen=True)
class Linformer(Strategy):
    """Queries attend to ``E^T K`` and ``F^T V``, r computed keys (section 4, eq. 7).

    k: computed keys, as a share of all keys or a count; prefix keys come on top, within the budget.
    E and F start as average pooling over cells of the token grid. shared: one table for both (the
    paper's key-value sharing). mass: each computed key's logit carries the log of how many tokens
    it stands for, learned from there; without it untrained attention favours prefix keys. Entries
    of E are small, so `calibrate` wants a small ``lr`` (3e-4).

    >>> Linformer(k=0.25).to_dict()["options"]["shared"]
    False
    """

    name = "linformer"
    paper = "https://arxiv.org/abs/2006.04768"
    fidelity = (
        "as published, but prefix tokens keep their own keys and dense rows, E and F start as "
        "average pooling, and logits carry log sizes (mass=False: none)"
    )
    needs_training = True
    selects_keys = False

    k: float = 0.25
    shared: bool = False
    mass: bool = True

    def planner(self, site: Site) -> LinformerPlanner:
        return LinformerPlanner(self, site)


class LinformerPlanner(LearnedPlanner):
    """The projections of one site, shared by its heads.

    e, f: ``[P + n, r]`` (f absent when shared); mass: ``[r]`` logits, absent without.
    """

    differentiable = True

    def __init__(self, strategy: Linformer, site: Site) -> None:
        super().__init__()
        tables.refuse_mask(strategy.name, site, site.bias == "mask")
        self.prefix, self.grid = site.prefix_tokens, site.key_grid
        self.own = self.prefix if strategy.prefix_keys else 0
        budget = max(1, tables.count(strategy.k, site.keys) - self.own)
        member = tables.members(self.grid, tables.cells_of(self.grid, budget))
        sizes = member.sum(0)
        pooling = nn.functional.pad(member / sizes, (0, 0, self.prefix, 0))
        self.e = nn.Parameter(pooling.clone(), requires_grad=False)
        self.f = None if strategy.shared else nn.Parameter(pooling.clone(), requires_grad=False)
        self.mass = nn.Parameter(sizes.log(), requires_grad=False) if strategy.mass else None

    def forward(self, inputs: AttentionInputs) -> Pattern:
        tables.refuse_mask("linformer", inputs.site, inputs.allowed() is not None)
        e, left = self._present(self.e, inputs)
        f = e if self.f is None else self._present(self.f, inputs)[0]
        k, v = (t.mT.to(x.dtype) @ x for t, x in ((e, inputs.k), (f, inputs.v)))
        if self.own:
            k = torch.cat([inputs.k[..., : self.own, :], k], dim=-2)
            v = torch.cat([inputs.v[..., : self.own, :], v], dim=-2)
        return Pattern.computed_keys(inputs, k, v, bias=self._bias(inputs, e, left))

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the output against dense attention."""
        return tables.output_loss(self(inputs), inputs)

    def _present(self, table: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """A table's rows for the tokens that are there, ``[B, 1, N, r]`` or ``[N, r]``, scaled so
        that columns weigh what they weighed; and the share of every cell that is left."""
        grid = inputs.image_grid
        ratio = self.grid[0] * self.grid[1] / (grid[0] * grid[1])
        whole = tables.resized(table, self.grid, grid, self.prefix)
        rows = tables.for_heads(inputs.gather_rows(whole))
        weight = rows.abs().sum(-2, keepdim=True)
        left = weight / whole.abs().sum(-2).clamp_min(1e-6)
        before = table.abs().sum(-2)
        return rows * (before / weight.clamp_min(1e-6)), left / ratio

    def _bias(self, inputs: AttentionInputs, e: Tensor, left: Tensor) -> Tensor | None:
        host = tables.host_bias(inputs)
        if self.mass is None and host is None:
            return None
        mass = e.new_zeros(e.shape[-1]) if self.mass is None else self.mass + left.log()
        mass = mass.expand(1, 1, 1, -1) if mass.dim() < 4 else mass
        own = mass.new_zeros(1, 1, 1, self.own)
        if host is not None:
            share = e.abs() / e.abs().sum(-2, keepdim=True).clamp_min(1e-6)
            mass = mass + host @ share.to(host.dtype)
            own = host[..., : self.own]
        return tables.join([own, mass]) if self.own else mass
