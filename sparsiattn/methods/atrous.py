"""Atrous attention of ACC-ViT: windows of patches that lie apart, at another rate per head.

ACC-ViT: Atrous Convolution's Comeback in Vision Transformers, arXiv 2403.04200.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import InvalidOption, Planner, Site, Strategy
from sparsiattn.methods._grid import Grid, GridPlanner, grid_pairs
from sparsiattn.methods._options import check_count, check_flag


@dataclass(frozen=True)
class Atrous(Strategy):
    """Windowed attention on interleaved sub-grids of the image (section 3.1 of the paper).

    At dilation d the grid falls into d x d sub-grids, each with every d-th row and column, and
    every sub-grid into windows of w x w patches; a patch sees those of its window. Dilation 1 is
    regional attention, larger ones are sparse. Windows at the border are smaller where sizes do not
    divide. Prefix tokens see all, and all see them.

    Args:
        window: Side w, in patches of a sub-grid. The grid's longer side at dilation 1, by itself or
            fused, reaches every key.
        dilations: Shared out evenly among the heads, in order.
        fuse: Whether every head sees the keys of all dilations at once, in one softmax.

    Raises:
        InvalidOption: For no dilation, or more of them than heads without ``fuse``.

    >>> Atrous(dilations=[1, 2, 4], fuse=True).to_dict()["options"]["dilations"]
    [1, 2, 4]
    """

    name = "atrous"
    paper = "https://arxiv.org/abs/2403.04200"
    fidelity = (
        "inspired by: the branches are heads of one attention, or one softmax over their keys, "
        "where the paper runs attention once per branch and mixes outputs by a learned gate; no "
        "relative position bias per branch, no convolutions"
    )
    needs_training = True
    needs_grid = True

    window: int = 7
    dilations: tuple[int, ...] | list[int] = (1, 2)
    fuse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        if not isinstance(self.dilations, (tuple, list)) or not self.dilations:
            raise InvalidOption(
                f"dilations must be a list of at least one int >= 1, got {self.dilations!r}"
            )
        for dilation in self.dilations:
            check_count("every one of dilations", dilation)
        object.__setattr__(self, "dilations", tuple(self.dilations))
        check_flag("fuse", self.fuse)

    def planner(self, site: Site) -> Planner:
        count, rates = len(self.dilations), tuple(self.dilations)
        if not self.fuse and count > site.heads:
            raise InvalidOption(
                f"atrous attention gives every head one of {count} dilations, and site "
                f"{site.name!r} has {site.heads} heads: name fewer dilations or pass fuse=True"
            )
        if not self.fuse:
            rates = tuple(rates[head * count // site.heads] for head in range(site.heads))
        return GridPlanner(regions, (self.window, rates, self.fuse))


def regions(
    grid: Grid, window: int, rates: tuple[int, ...], fuse: bool, *, device: torch.device
) -> Tensor:
    """Pairs of patches in one window.

    Args:
        grid: Rows and columns of patches.
        window: Side of the window, in patches of a sub-grid.
        rates: The dilation of every head, or those that each head sees together.
        fuse: Which of the two.
        device: Where to make the mask.

    Returns:
        ``[H, n, n]``; ``[1, n, n]`` if fused.
    """
    by_rate = {rate: _together(grid, window, rate, device) for rate in set(rates)}
    masks = torch.stack([by_rate[rate] for rate in rates])
    return masks.any(0, keepdim=True) if fuse else masks


def _together(grid: Grid, window: int, rate: int, device: torch.device) -> Tensor:
    """Pairs of patches in one window of one sub-grid, ``[n, n]``."""
    same = []
    for size in grid:
        index = torch.arange(size, device=device)
        # the sub-grid, and the window within it, as one number
        region = index // (rate * window) * rate + index % rate
        same.append(region[:, None] == region)
    return grid_pairs(*same)
