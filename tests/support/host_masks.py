"""Calls with a host's mask or bias, of the kinds that vision models have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, Site
from sparsiattn.attention.factored_bias import FactoredBias

KINDS = ("none", "bias", "factors", "mask", "bool", "padding", "regions", "dead rows")
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """What a call is made of.

    Attributes:
        grid: Rows and columns of patches.
        prefix: Tokens before them.
        dims: Channels of keys, and of values.
        kind: One of `KINDS`.
        lead: Images and heads that have a bias of their own, ``(1 or 2, 1 or 3)``.
        dtype: Of the operands.
        seed: Of all numbers.
    """

    grid: tuple[int, int]
    prefix: int
    dims: tuple[int, int]
    kind: str
    lead: tuple[int, int]
    dtype: torch.dtype
    seed: int

    def as_sam(self) -> Case:
        """The same without a prefix where a bias is given by factors: compiled code reads these."""
        return replace(self, prefix=0) if self.kind == "factors" else self

    def inputs(self, *, tile: object = 1, block: object = 1) -> AttentionInputs:
        """The operands, laid out as a host's."""
        (dim, width), n = self.dims, self.grid[0] * self.grid[1] + self.prefix
        generator = torch.Generator().manual_seed(self.seed)
        packed = torch.randn(2, n, 3, 2 * dim + width, generator=generator).transpose(1, 2)
        q, k, v = packed.to(self.dtype).split((dim, dim, width), dim=-1)
        bias = self._bias(n, generator)
        site = Site.of(
            q, k, v, prefix_tokens=self.prefix, grid=self.grid, key_grid=self.grid,
            bias={"none": "none", "bias": "bias", "factors": "bias"}.get(self.kind, "mask"),
        )  # fmt: skip
        return AttentionInputs(
            q, k, v, dim**-0.5, bias, site, tile=tile, block=block  # type: ignore[arg-type]
        )  # fmt: skip

    def _bias(self, n: int, generator: torch.Generator) -> Tensor | None:
        images, heads = self.lead
        if self.kind == "factors":
            return self._factors(n, generator)
        favours = 2 * torch.randn(images, heads, n, n, generator=generator)
        chance = torch.rand(images, heads, n, n, generator=generator)
        region = torch.randint(0, 3, (images, 1, n), generator=generator)
        apart = region[..., None] != region[..., None, :]
        seen = chance < 0.6
        if self.kind == "dead rows":
            seen[..., n // 2, :] = False
        return {
            "none": None,
            "bias": favours,
            "mask": favours.masked_fill(chance < 0.3, -100.0).to(self.dtype),
            "bool": seen,
            "padding": seen[:, :1, :1],
            "regions": favours - 100.0 * apart,
            "dead rows": torch.zeros_like(chance).masked_fill(~seen, float("-inf")),
        }[self.kind]

    def _factors(self, n: int, generator: torch.Generator) -> Tensor:
        """Of the grid of patches, or of one with its sides exchanged; of one row with a prefix."""
        down, across = (1, n) if self.prefix else self.grid[:: 1 if self.seed % 3 else -1]
        shape = (*self.lead, n, down + across)
        rows, columns = torch.randn(shape, generator=generator).split((down, across), dim=-1)
        return FactoredBias(rows, columns)


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """Of a result that is rounded to ``dtype`` once."""
    return {
        torch.float32: {"rtol": 1e-4, "atol": 2e-5},
        torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
        torch.float16: {"rtol": 2e-3, "atol": 2e-4},
    }[dtype]
