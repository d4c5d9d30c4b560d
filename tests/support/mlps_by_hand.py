"""Blocks whose grid must stay, by hand: tokens that were dropped skip the MLP. Nothing here is the
library's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Spared:
    """Blocks driven by hand. stages: those through which one grid goes, in order; norm: the name of
    the module that takes the sum before the MLP; reducing: blocks, by their number among all, that
    keep a share of the patches that are left, those of the largest norm; prefix: tokens before
    the patches of each stage, which take every MLP."""

    def __init__(
        self,
        stages: list[list[Any]],
        norm: str,
        reducing: Collection[int],
        keep: float,
        prefix: tuple[int, ...],
    ) -> None:
        self.stages, self.norm, self.keep, self.prefix = stages, norm, keep, prefix
        blocks = [block for stage in stages for block in stage]
        self.reducing = [blocks[i] for i in reducing]
        self.left = torch.empty(0)

    @contextmanager
    def driven(self) -> Iterator[None]:
        try:
            for stage, prefix in zip(self.stages, self.prefix, strict=True):
                for block in stage:
                    first = block is stage[0]
                    block.forward = self.forward(block, type(block).forward, first, prefix)
            yield
        finally:
            for stage in self.stages:
                for block in stage:
                    del block.forward

    def forward(self, block: nn.Module, host: Any, first: bool, prefix: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            sums: list[Tensor] = []
            norm = block.get_submodule(self.norm)
            with norm.register_forward_pre_hook(lambda _, given: sums.append(given[0])):
                out = host(block, *args, **kwargs)
            tokens = out if isinstance(out, Tensor) else out[0]
            if first:
                self.left = torch.ones(len(tokens), tokens.shape[1] - prefix, dtype=torch.bool)
            mixed = self.mixed(sums[0], tokens, prefix, block in self.reducing)
            return mixed if isinstance(out, Tensor) else (mixed, *out[1:])

        return run

    def mixed(self, before: Tensor, after: Tensor, prefix: int, reduces: bool) -> Tensor:
        """Tokens ``[R, N, C]`` with the MLP where they take it, and without it elsewhere."""
        if reduces:
            rows = zip(before[:, prefix:], self.left, strict=True)
            self.left = torch.stack([self.best(*row) for row in rows])
        takes = nn.functional.pad(self.left, (prefix, 0), value=True)
        return torch.where(takes[..., None], after, before)

    def best(self, x: Tensor, left: Tensor) -> Tensor:
        """Which of the patches ``[n, C]`` that are left stay so."""
        norms = x.norm(dim=-1).masked_fill(~left, -1.0)
        count = math.ceil(self.keep * int(left.sum()))
        return torch.zeros_like(left).index_fill(0, norms.topk(count).indices, True)
