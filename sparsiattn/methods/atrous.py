"""Atrous attention of ACC-ViT: windows of dilated patches, with a dilation rate per head.

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

    At dilation d the grid is divided into d x d sub-grids, each with every d-th row and column, and
    every sub-grid into windows of w x w patches. A patch attends to the patches of its window.
    Dilation 1 is regional attention. Windows at the border are smaller if sizes are not divisible.
    Prefix tokens attend to all tokens, and all tokens attend to them.

    Args:
        window: Side w, in patches of a sub-grid. The grid's longer side at dilation 1 reaches every
            key, alone or with ``fuse``.
        dilations: Dilation rates, divided evenly among the heads in order.
        fuse: Whether every head attends to the keys of all dilations in one softmax.

    Raises:
        InvalidOption: There is no dilation, or without ``fuse`` there are more than heads.

    >>> Atrous(dilations=[1, 2, 4], fuse=True).to_dict()["options"]["dilations"]
    [1, 2, 4]
    """

    name = "atrous"
    paper = "https://arxiv.org/abs/2403.04200"
    fidelity = (
        "inspired by: branches are heads of one attention, or one softmax over their keys, while "
        "the paper runs attention once per branch and mixes outputs by a learned gate; there is no "
        "relative position bias per branch and there are no convolutions"
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
            check_count("every element of dilations", dilation)
        object.__setattr__(self, "dilations", tuple(self.dilations))
        check_flag("fuse", self.fuse)

    def planner(self, site: Site) -> Planner:
        count, rates = len(self.dilations), tuple(self.dilations)
        if not self.fuse and count > site.heads:
            raise InvalidOption(
                f"atrous attention gives every head one of {count} dilations, but site "
                f"{site.name!r} has {site.heads} heads: pass fewer dilations or fuse=True"
            )
        if not self.fuse:
            rates = tuple(rates[head * count // site.heads] for head in range(site.heads))
        return GridPlanner(regions, (self.window, rates, self.fuse))


def regions(
    grid: Grid, window: int, rates: tuple[int, ...], fuse: bool, *, device: torch.device
) -> Tensor:
    """Pairs of patches in the same window.

    Args:
        grid: Rows and columns of patches.
        window: Side of the window, in patches of a sub-grid.
        rates: The dilation of every head; with ``fuse``, the dilations that every head combines.
        fuse: Whether dilations are combined.
        device: Device of the mask.

    Returns:
        ``[H, n, n]``; ``[1, n, n]`` if fused.
    """
    by_rate = {rate: _together(grid, window, rate, device) for rate in set(rates)}
    masks = torch.stack([by_rate[rate] for rate in rates])
    return masks.any(0, keepdim=True) if fuse else masks


def _together(grid: Grid, window: int, rate: int, device: torch.device) -> Tensor:
    """Pairs of patches in the same window of the same sub-grid, ``[n, n]``."""
    same = []
    for size in grid:
        index = torch.arange(size, device=device)
        # one number for the sub-grid and the window within it
        region = index // (rate * window) * rate + index % rate
        same.append(region[:, None] == region)
    return grid_pairs(*same)
