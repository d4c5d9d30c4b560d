"""Atrous attention of ACC-ViT: windows of patches that lie apart, at another rate per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Planner, Site, Strategy
from sparsiattn.methods._fixed import Grid, both, check_count, check_flag, laid


@dataclass(frozen=True)
class Atrous(Strategy):
    """Windowed attention on interleaved sub-grids of the image (section 3.1 of the paper).

    At dilation d the grid falls into d x d sub-grids, each with every d-th row and column, and
    every sub-grid into windows of w x w patches; a patch sees those of its window. Dilation 1 is
    regional attention, larger ones are sparse. Windows at the border are smaller where sizes do not
    divide. Prefix tokens see all, and all see them.

    window: side w, in patches of a sub-grid. dilations: shared out evenly among the heads, in
    order. fuse: every head sees the keys of all dilations at once, in one softmax. Raises
    `InvalidOption` for no dilation, or more of them than heads without ``fuse``. A window of the
    grid's longer side at dilation 1, by itself or fused, reaches every key.

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

    window: int = 7
    dilations: tuple[int, ...] | list[int] = (1, 2)
    fuse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        if not isinstance(self.dilations, (tuple, list)) or not self.dilations:
            raise InvalidOption(
                f"dilations must be a list of at least one int >= 1, got {self.dilations!r}"
            )
        for dilation in self.dilations:
            check_count("every one of dilations", dilation, 1)
        object.__setattr__(self, "dilations", tuple(self.dilations))
        check_flag("fuse", self.fuse)

    def planner(self, site: Site) -> Planner:
        count = len(self.dilations)
        if self.fuse:
            return AtrousPlanner(self, tuple(self.dilations))
        if count > site.heads:
            raise InvalidOption(
                f"atrous attention gives every head one of {count} dilations, and site "
                f"{site.name!r} has {site.heads} heads: name fewer dilations or pass fuse=True"
            )
        heads = range(site.heads)
        return AtrousPlanner(self, tuple(self.dilations[h * count // site.heads] for h in heads))


@dataclass(frozen=True)
class AtrousPlanner:
    """One site. rates: the dilation of every head, or those that each head sees together."""

    strategy: Atrous
    rates: tuple[int, ...]

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        own = self.strategy
        key = inputs.image_grid, own.window, self.rates, own.fuse
        return laid(inputs.table(regions, *key), inputs)


def regions(
    grid: Grid, window: int, rates: tuple[int, ...], fuse: bool, *, device: torch.device
) -> Tensor:
    """Pairs of patches in one window, ``[H, n, n]``; of any rate, ``[1, n, n]``, if fused."""
    same = {rate: _together(grid, window, rate, device) for rate in sorted(set(rates))}
    if not fuse:
        return torch.stack([same[rate] for rate in rates])
    keep = same.popitem()[1]
    for other in same.values():
        keep = keep | other
    return keep.unsqueeze(0)


def _together(grid: Grid, window: int, rate: int, device: torch.device) -> Tensor:
    """Pairs of patches in one window of one sub-grid, ``[n, n]``."""
    same = []
    for size in grid:
        at = torch.arange(size, device=device)
        # the sub-grid, and the window within it, as one number
        region = at // (rate * window) * rate + at % rate
        same.append(region[:, None] == region)
    return both(*same)
