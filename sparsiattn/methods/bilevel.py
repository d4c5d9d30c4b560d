"""Bi-level routing attention: queries select regions first, then attend within those.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Site, Strategy
from sparsiattn.methods._grid import Grid
from sparsiattn.methods._options import check_flag


@dataclass(frozen=True)
class BiLevel(Strategy):
    """Queries of a region attend to the tokens of the k best-matching regions (section 3.2).

    ``A_r = q_r k_r^T`` for the mean query and mean key of every region of an S x S partition (eqs.
    3 and 4). The best regions of every row are kept, and tokens attend within them (eqs. 5 and 6).
    A region is a ``tile`` of queries and a ``block`` of keys, so kernels read whole blocks.

    Predictor MACs: ``R^2 D`` per head for R regions.

    Args:
        k: Share or count of keys per query, prefix keys included. The last region is kept in part
            if the budget requires it. To keep m complete regions of p patches, pass the count
            ``prefix + m * p`` (m is topk in the paper).
        regions: S, or (rows, columns). A region has at least 2 x 2 patches, as selecting smaller
            ones would cost as much as all logits; small windows therefore have fewer regions.
            Grids that S does not divide get regions of about ceil(side / S) patches.
        shared: Whether all heads use the same regions, selected by the sum of their affinities, as
            published; else each head selects its own.
        tile: ``"auto"`` for the regions; other values group queries in another way.
        block: ``"auto"`` for the regions; other values group keys in another way.

    >>> from sparsiattn.testing.hosts import random_inputs
    >>> inputs = random_inputs((4, 4), prefix=1)
    >>> strategy = BiLevel(k=1 + 2 * 4, regions=2)  # the class token and two regions of four
    >>> strategy.plan(inputs).to_mask()[0, 0].sum(-1).unique().tolist()
    [9]
    """

    name = "bilevel"
    paper = "https://arxiv.org/abs/2303.08810"
    fidelity = (
        "as published code, without LePE (a convolution on the values); regions are tiles and key "
        "blocks of the core, padding is not part of their means, the last region may be kept in "
        "part, and pretrained models keep their own scale"
    )
    needs_grid = True

    k: float = 0.25
    regions: int | tuple[int, int] = 7
    shared: bool = True
    block: int | tuple[int, int] | str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self._sides()
        if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
            raise InvalidOption(
                "regions must be an int >= 1 or (rows, columns) of regions, each >= 1; "
                f"got {self.regions!r}"
            )
        if isinstance(self.regions, list):
            object.__setattr__(self, "regions", sides)
        check_flag("shared", self.shared, InvalidOption)

    def _sides(self) -> tuple[int, ...]:
        """Number of rows and columns of regions."""
        sides = self.regions
        return tuple(sides) if isinstance(sides, (tuple, list)) else (sides, sides)

    def resolve_for(self, site: Site, position: int, count: int) -> Strategy:
        """A copy with the regions of this site as tiles and blocks."""
        resolved = super().resolve_for(site, position, count)
        regions = {"tile": self.region(site.grid), "block": self.region(site.key_grid)}
        auto: dict[str, Any] = {n: r for n, r in regions.items() if getattr(self, n) == "auto"}
        return replace(resolved, **auto)

    def region(self, grid: Grid) -> Grid:
        """Rows and columns of patches in a region of a grid.

        >>> BiLevel().region((14, 14)), BiLevel(regions=(2, 4)).region((8, 12))
        ((2, 2), (4, 3))
        """
        rows, columns = self._sides()
        if grid[0] == 1:  # tokens are not in raster order: regions are runs of tokens
            return 1, min(grid[1], max(4, math.ceil(grid[1] / (rows * columns))))
        height, width = (
            min(size, max(2, math.ceil(size / parts)))
            for size, parts in zip(grid, (rows, columns), strict=True)
        )
        return height, width

    def plan(self, inputs: AttentionInputs) -> Pattern:
        tile = self.region(inputs.query_grid) if isinstance(inputs.tile, int) else inputs.tile
        block = self.region(inputs.key_grid) if isinstance(inputs.block, int) else inputs.block
        regional = inputs.replace(tile=tile, block=block)
        # without the host's mask there are blocks even where the core selects individual keys
        tiles, blocks = regional.tiles, regional.replace(bias=None).blocks
        assert tiles is not None
        assert blocks is not None
        keys, prefix = inputs.k[..., inputs.prefix :, :], inputs.k[..., : inputs.prefix, :]
        visible = inputs.visible_keys
        if visible is None:
            means = blocks.mean(keys)
        else:
            weight = visible[..., inputs.prefix :, None].to(keys.dtype)
            means = blocks.mean(keys * weight) / blocks.mean(weight).clamp_min(1e-6)
        queries = regional.row_queries
        scores = self._affinity(queries, means)
        if inputs.blocks is None:
            key_scores = blocks.spread(scores.mT).mT
            scores = torch.cat([self._affinity(queries, prefix), key_scores], dim=-1)
        return Pattern.top(tiles.spread(scores) if inputs.tiles is None else scores, self.k)

    def _affinity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Affinity ``[B, H, R, M]``, or ``[B, 1, R, M]`` if shared, of queries and keys."""
        affinity = queries @ keys.mT
        return affinity.sum(1, keepdim=True) if self.shared else affinity
