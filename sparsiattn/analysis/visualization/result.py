"""The record of `show`: tensors by site, and tokens by block. `view` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsiattn.analysis.visualization.token_places import TokenPlaces
from sparsiattn.errors import InvalidOption, unknown

# fields that `SiteAttention.to_dict` copies, and fields that it lists for every query
_FACTS = ("name", "index", "heads", "grid", "tokens", "keys", "windows", "dense", "fused")
_ROWS = ("queries", "exact", "kept", "pattern", "background", "place")


class Point(NamedTuple):
    """A position in the image.

    Attributes:
        y: Share of the image's height.
        x: Share of the image's width.
    """

    y: float
    x: float

    def on(self, grid: Sequence[int]) -> tuple[int, int]:
        """Row and column of the patch at this position.

        >>> Point(0.5, 0.99).on((14, 14))
        (7, 13)
        """
        return min(grid[0] - 1, int(self.y * grid[0])), min(grid[1] - 1, int(self.x * grid[1]))


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteAttention(TokenPlaces):
    """Attention of one site, and the positions of its tokens.

    Tokens are numbered window by window, with prefix tokens first in each window.

    Attributes:
        name: Name of the site's module.
        index: Index of the site in its model.
        heads: Indices of the H recorded heads.
        tokens: Number of query tokens in one window.
        keys: Number of keys in one window, Nk.
        windows: Number of windows of the image.
        prefix: Number of prefix tokens in each window.
        block: Index of its block, if tokens are dropped or merged there; else None.
        queries: ``[Q]``, indices of the recorded query tokens.
        exact: ``[H, Q, Nk]``, dense softmax over the keys of the query's window.
        kept: ``[H, Q, Nk]`` bool, the pairs that the pattern computes.
        pattern: ``[H, Q, Nk]``, softmax over the kept pairs.
        background: ``[H, Q]``, share of that softmax on pooled keys.
        mass: ``[H]``, share of exact attention on kept keys, mean over all patch queries.
        density: ``[H]``, share of kept pairs, mean over all patch queries.
        dense: Whether the host's own attention runs here.
    """

    name: str
    index: int
    heads: tuple[int, ...]
    tokens: int
    keys: int
    windows: int
    prefix: int
    block: int | None
    queries: Tensor
    exact: Tensor
    kept: Tensor
    pattern: Tensor
    background: Tensor
    mass: Tensor
    density: Tensor
    dense: bool

    def query(self, row: int, column: int) -> int | None:
        """Index of the recorded query of a patch, or of the nearest patch with one.

        Returns:
            An index into ``queries``; None if the patch was dropped earlier.

        Raises:
            InvalidOption: The positions of the tokens are not known.
        """
        if self.place is None:
            raise self._no_picture()
        query = int(self.lookup[row, column])
        return None if query < 0 else query

    def _no_picture(self) -> InvalidOption:
        return InvalidOption(f"{self.name} has no picture: {self.why}")

    @cached_property
    def lookup(self) -> Tensor:
        """Index of the query of each patch, ``[rows, columns]``.

        For a patch without a recorded query, it is that of the nearest patch with one. It is -1 if
        the patch was dropped. The tensor is empty without a grid.
        """
        if self.place is None:
            return torch.empty(0, 0, dtype=torch.long)
        query_of_token = torch.full((self.tokens * self.windows + 1,), -1)
        query_of_token[self.queries] = torch.arange(len(self.queries))
        lookup = query_of_token[self.place]  # place -1 reads the spare last entry
        known, unknown = (lookup >= 0).nonzero(), ((lookup < 0) & (self.place >= 0)).nonzero()
        if len(known) and len(unknown):
            # shifted by a quarter of a patch to break ties
            nearest = torch.cdist(unknown + 0.25, known.float()).argmin(1)
            lookup[tuple(unknown.T)] = lookup[tuple(known[nearest].T)]
        return lookup

    def by_patch(self, values: Tensor, query: int) -> Tensor:
        """Arrange values of keys by patch.

        The value of a merged token is divided among its patches. Patches in other windows and
        dropped patches are zero.

        Args:
            values: ``[..., Nk]``, values of one query.
            query: Index of that query in ``queries``.

        Returns:
            ``[..., rows, columns]``, values of key patches.

        Raises:
            InvalidOption: The positions of the tokens are not known.
        """
        place = self.key_place
        if place is None:
            raise self._no_picture()
        window = int(self.queries[query]) // self.tokens
        inside = (place >= 0) & (place // self.keys == window)
        patches = torch.bincount(place[inside] % self.keys, minlength=self.keys).clamp_min(1)
        shares: Tensor = values.float() / patches
        return shares[..., (place % self.keys).clamp_min(0)] * inside

    def attention(self, row: int, column: int, of: str = "exact") -> Tensor:
        """Attention of a patch's query to every patch; zeros if the patch was dropped earlier.

        Args:
            row: Row of the patch.
            column: Column of the patch.
            of: ``"exact"`` or ``"pattern"``.

        Returns:
            ``[H, rows, columns]``.

        Raises:
            InvalidOption: ``of`` is invalid, or the positions of the tokens are not known.
        """
        if of not in ("exact", "pattern"):
            raise InvalidOption(f"of must be 'exact' or 'pattern', got {of!r}")
        return self._of_patch(getattr(self, of), row, column)

    def keys_kept(self, row: int, column: int) -> Tensor:
        """Mask of the patches whose keys the pattern keeps for a patch, ``[H, rows, columns]``."""
        return self._of_patch(self.kept, row, column) > 0

    def _of_patch(self, values: Tensor, row: int, column: int) -> Tensor:
        """Values ``[H, Q, Nk]`` of one patch's query, by key patch; zeros if it was dropped."""
        query = self.query(row, column)
        if query is None:
            assert self.key_place is not None
            return torch.zeros(len(self.heads), *self.key_place.shape)
        return self.by_patch(values[:, query], query)

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """Plain data by head; with ``rows`` also the attention of every query, as lists."""
        facts = {name: getattr(self, name) for name in _FACTS}
        facts |= {"heads": list(self.heads), "fused": list(self.fused), "note": self.why}
        facts |= {"prefix_tokens": self.prefix, "queries": len(self.queries)}
        facts |= {"density": _listed(self.density), "mass": _listed(self.mass)}
        if rows:
            facts["rows"] = {name: _listed(getattr(self, name)) for name in _ROWS}
        return facts


@dataclass(frozen=True, eq=False)
class BlockTokens:
    """The patch tokens after a block.

    Attributes:
        name: Name of the block.
        index: Index of the block.
        count: Number of patch tokens left.
        place: ``[rows, columns]``, the token of each original patch; -1 if it was dropped. Patches
            with the same token were merged.
        fused: Tokens into which dropped tokens were fused.
        mlp_only: Whether the block keeps its grid; the tokens are those that pass through its MLP.
    """

    name: str
    index: int
    count: int
    place: Tensor
    fused: tuple[int, ...] = ()
    mlp_only: bool = False

    @property
    def dropped(self) -> int:
        """Number of patches that are in no token, or only in a fused token."""
        fused = torch.tensor(self.fused, dtype=torch.long)
        return int(((self.place < 0) | torch.isin(self.place, fused)).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        facts = {"name": self.name, "index": self.index, "tokens": self.count}
        facts |= {"dropped": self.dropped, "fused": list(self.fused), "mlp_only": self.mlp_only}
        return {**facts, "place": self.place.tolist()}


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """A patched model's attention in one image. Index it by a site's name or position.

    Attributes:
        model: Class name of the model.
        strategy: The patch's strategy as plain data, see `Config.to_dict`.
        pixels: ``[H, W, 3]`` uint8, the model's input as a picture.
        sites: The recorded sites.
        tokens: The tokens after each block; empty without a token strategy.
        points: Query positions of pictures.
        step: Queries were recorded for every ``step``-th patch of rows and columns.
    """

    model: str
    strategy: dict[str, Any]
    pixels: Tensor
    sites: tuple[SiteAttention, ...]
    tokens: tuple[BlockTokens, ...]
    points: tuple[Point, ...]
    step: int = 1

    def __getitem__(self, key: str | int) -> SiteAttention:
        if isinstance(key, int):
            return self.sites[key]
        by_name = {site.name: site for site in self.sites}
        if key not in by_name:
            raise unknown("site", key, by_name)
        return by_name[key]

    @property
    def title(self) -> str:
        """Model and strategy, as in ``VisionTransformer, connectivity k=0.1``."""
        options = self.strategy.get("options", {})
        words = [str(self.strategy["name"])]
        for name in ("k", "keep", "r", "ratio"):
            if options.get(name) is not None and len(str(options[name])) < 40:
                words.append(f"{name}={options[name]}")
        return f"{self.model}, {' '.join(words)}"

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """Plain data for JSON; with ``rows`` also the attention of every query, which is large."""
        return {
            "model": self.model,
            "strategy": self.strategy,
            "image": list(self.pixels.shape[:2]),
            "step": self.step,
            "points": [list(point) for point in self.points],
            "sites": [site.to_dict(rows) for site in self.sites],
            "tokens": [block.to_dict() for block in self.tokens],
        }

    def __str__(self) -> str:
        lines = [f"{self.title}, image {self.pixels.shape[0]} x {self.pixels.shape[1]}"]
        for site in self.sites:
            density, mass = 100 * float(site.density.mean()), 100 * float(site.mass.mean())
            text = f"keeps {density:.1f} % of the pairs, {mass:.1f} % of exact attention"
            reason = f" ({site.why})" if site.why else ""
            lines.append(f"{site.name}: {'dense' if site.dense else text}{reason}")
        lines += [f"after {block.name}: {block.count} patch tokens" for block in self.tokens]
        return "\n".join(lines)

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__


def _listed(values: Tensor | None) -> Any:
    """A tensor as lists, rounded to 6 decimals."""
    if values is not None and values.is_floating_point():
        values = values.double().round(decimals=6)
    return None if values is None else values.tolist()
