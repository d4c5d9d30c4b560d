"""What `show` returns: tensors by site, and the pictures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid
from sparsiattn.errors import InvalidOption, unknown

VIEWS = ("overview", "layers", "heads", "tokens", "density")


class Point(NamedTuple):
    """A place in the image, as shares of its height and width."""

    y: float
    x: float

    def on(self, grid: Sequence[int]) -> tuple[int, int]:
        """Row and column of the patch there.

        >>> Point(0.5, 0.99).on((14, 14))
        (7, 13)
        """
        return min(grid[0] - 1, int(self.y * grid[0])), min(grid[1] - 1, int(self.x * grid[1]))


@dataclass(frozen=True, eq=False)
class SiteShown:
    """Attention of one site. Tokens are numbered window after window (``tokens`` in each), prefix
    tokens first.

    heads: indices of the heads shown, H of them. queries: ``[Q]``, numbers of the query tokens
    below. exact: ``[H, Q, Nk]``, dense softmax over the keys of the query's window. kept: the same
    shape, bool, the pairs that the pattern computes. pattern: its softmax over them. background:
    ``[H, Q]``, the share of that softmax on pooled keys. place, key_place: ``[rows, columns]``, the
    token that holds each patch as query and as key, -1 where it is gone; None where that is not
    known, and ``why`` says so. mass: ``[H]``, share of exact attention on kept keys; density:
    ``[H]``, share of pairs kept: both means over all patch queries. block: index of its block where
    tokens are dropped or merged. dense: the host's own attention runs here. fused: tokens that hold
    the sum of dropped ones, at no place.
    """

    name: str
    index: int
    heads: tuple[int, ...]
    tokens: int
    keys: int
    windows: int
    prefix: int
    block: int | None
    place: Tensor | None
    key_place: Tensor | None
    why: str
    queries: Tensor
    exact: Tensor
    kept: Tensor
    pattern: Tensor
    background: Tensor
    mass: Tensor
    density: Tensor
    dense: bool
    fused: tuple[int, ...] = ()

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of patches; None where the tokens' places are not known."""
        return None if self.place is None else (self.place.shape[0], self.place.shape[1])

    def query(self, row: int, column: int) -> int | None:
        """Which of the Q queries holds a patch, the nearest where not all are there; None where the
        patch was dropped before."""
        if self.place is None:
            raise InvalidOption(f"{self.name} has no picture: {self.why}")
        found = int(self.lookup[row, column])
        return None if found < 0 else found

    @cached_property
    def lookup(self) -> Tensor:
        """``[rows, columns]``: the query of each patch, or that of the nearest patch that has one;
        -1 where the patch is gone. Empty where there is no grid."""
        if self.place is None:
            return torch.empty(0, 0, dtype=torch.long)
        where = torch.full((self.tokens * self.windows + 1,), -1)
        where[self.queries] = torch.arange(len(self.queries))
        own = where[self.place]  # place -1 reads the spare last entry
        known, wanted = (own >= 0).nonzero(), ((own < 0) & (self.place >= 0)).nonzero()
        if len(known) and len(wanted):
            # a quarter of a patch more, so that of an even number of patches each takes its own
            nearest = torch.cdist(wanted + 0.25, known.float()).argmin(1)
            own[tuple(wanted.T)] = own[tuple(known[nearest].T)]
        return own

    def by_patch(self, values: Tensor, query: int) -> Tensor:
        """``[..., Nk]`` of one query as ``[..., rows, columns]`` of key patches. A merged token's
        value is shared among its patches; what lies in other windows, or is gone, is zero."""
        place = self.key_place
        if place is None:
            raise InvalidOption(f"{self.name} has no picture: {self.why}")
        window = int(self.queries[query]) // self.tokens
        inside = (place >= 0) & (place // self.keys == window)
        values = values.float()
        size = torch.bincount(place[inside] % self.keys, minlength=self.keys).clamp_min(1)
        found: Tensor = (values / size)[..., (place % self.keys).clamp_min(0)] * inside
        return found

    def attention(self, row: int, column: int, of: str = "exact") -> Tensor:
        """``[H, rows, columns]``: attention of a patch's query to every patch; ``of``:
        ``"exact"`` or ``"pattern"``. All zero where the patch was dropped before."""
        if of not in ("exact", "pattern"):
            raise InvalidOption(f"of must be 'exact' or 'pattern', got {of!r}")
        query = self.query(row, column)
        if query is None:
            assert self.key_place is not None
            return torch.zeros(len(self.heads), *self.key_place.shape)
        return self.by_patch(getattr(self, of)[:, query], query)

    def keys_kept(self, row: int, column: int) -> Tensor:
        """``[H, rows, columns]`` bool: the patches whose keys the pattern keeps for a patch."""
        query = self.query(row, column)
        if query is None or self.key_place is None:
            return torch.zeros(len(self.heads), *(self.grid or (0, 0)), dtype=torch.bool)
        return self.by_patch(self.kept[:, query], query) > 0

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """Figures by head; with ``rows`` also the attention of every query, as nested lists."""
        about = {
            "name": self.name, "index": self.index, "heads": list(self.heads), "grid": self.grid,
            "tokens": self.tokens, "keys": self.keys, "windows": self.windows,
            "prefix_tokens": self.prefix, "queries": len(self.queries), "dense": self.dense,
            "fused": list(self.fused),
            "density": _listed(self.density), "mass": _listed(self.mass), "note": self.why,
        }  # fmt: skip
        if rows:
            about["rows"] = {
                name: _listed(getattr(self, name))
                for name in ("queries", "exact", "kept", "pattern", "background", "place")
            }
        return about


@dataclass(frozen=True, eq=False)
class BlockTokens:
    """The patch tokens that a block leaves.

    count: how many. place: ``[rows, columns]``, the token that each original patch is in, -1 where
    it was dropped; patches of one token were merged. fused: tokens into which dropped ones were
    fused. mlp_only: the grid stays, and these are the tokens that take the block's MLP.
    """

    name: str
    index: int
    count: int
    place: Tensor
    fused: tuple[int, ...] = ()
    mlp_only: bool = False

    @property
    def dropped(self) -> int:
        """Patches that are in no token, or only in a fused one."""
        fused = torch.tensor(self.fused, dtype=torch.long)
        return int(((self.place < 0) | torch.isin(self.place, fused)).sum())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "index": self.index, "tokens": self.count, "dropped": self.dropped,
            "fused": list(self.fused), "mlp_only": self.mlp_only, "place": self.place.tolist(),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A patched model's attention in one image. Index it by a site's name or number.

    model: its class. strategy: as the patch's config. pixels: ``[H, W, 3]`` uint8, what the model
    saw. sites: every site shown. tokens: by block, where a token strategy is at work. points: where
    pictures look. step: queries are there for every step-th patch of a row and a column.
    """

    model: str
    strategy: dict[str, Any]
    pixels: Tensor
    sites: tuple[SiteShown, ...]
    tokens: tuple[BlockTokens, ...]
    points: tuple[Point, ...]
    step: int = 1

    def __getitem__(self, which: str | int) -> SiteShown:
        if isinstance(which, int):
            return self.sites[which]
        for site in self.sites:
            if site.name == which:
                return site
        raise unknown("site", which, [site.name for site in self.sites])

    @property
    def title(self) -> str:
        """Model and strategy in words: ``VisionTransformer, connectivity k=0.1``."""
        options = self.strategy.get("options", {})
        said = [
            f"{name}={options[name]}"
            for name in ("k", "keep", "r", "ratio")
            if options.get(name) is not None and len(str(options[name])) < 40
        ]
        return f"{self.model}, {' '.join([str(self.strategy['name']), *said])}"

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """Plain values for JSON; with ``rows`` the attention of every query, which is much."""
        return {
            "model": self.model,
            "strategy": self.strategy,
            "image": list(self.pixels.shape[:2]),
            "step": self.step,
            "points": [list(point) for point in self.points],
            "sites": [site.to_dict(rows) for site in self.sites],
            "tokens": [block.to_dict() for block in self.tokens],
        }

    def figure(self, view: str = "overview", site: str | int | None = None) -> Any:
        """A matplotlib figure (needs the ``viz`` extra).

        view: ``"overview"`` compares exact attention with the pattern, ``"layers"`` and
        ``"heads"`` show every layer, or every head of ``site``, ``"tokens"`` what is dropped and
        merged, ``"density"`` the shares kept by layer and head. site: by name or number, by default
        the middle one.
        """
        from sparsiattn.analysis.visualization.figures import figure

        if view not in VIEWS:
            raise unknown("view", view, VIEWS)
        return figure(self, view, site)

    def html(self) -> str:
        """One page that needs nothing else: hover over a patch to see its keys."""
        from sparsiattn.analysis.visualization.html_page import page

        return page(self)

    def save(
        self, path: str | PathLike[str], view: str = "overview", site: str | int | None = None
    ) -> Path:
        """Write a picture (``.png``, ``.svg``, ``.pdf``; see `figure`) or the page (``.html``)."""
        path = Path(path)
        kind = path.suffix.lower()
        if kind not in (".html", ".htm", ".png", ".svg", ".pdf"):
            raise InvalidOption(
                f"show() writes .html, .png, .svg and .pdf, got {path.name!r}: name the file so"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind in (".html", ".htm"):
            path.write_text(self.html(), encoding="utf-8")
        else:
            from sparsiattn.analysis.visualization.figures import write

            write(self.figure(view, site), path)
        return path

    def _repr_html_(self) -> str:
        """The page in a notebook."""
        return (
            '<iframe style="width:100%;height:900px;border:0" sandbox="allow-scripts" '
            f'srcdoc="{escape(self.html(), quote=True)}"></iframe>'
        )

    def __str__(self) -> str:
        lines = [f"{self.title}, image {self.pixels.shape[0]} x {self.pixels.shape[1]}"]
        for site in self.sites:
            share, density = float(site.mass.mean()), float(site.density.mean())
            text = f"{site.name}: keeps {100 * density:.1f} % of the pairs, {100 * share:.1f} % of"
            text += " exact attention"
            text = f"{site.name}: dense" if site.dense else text
            lines.append(text + (f" ({site.why})" if site.why else ""))
        lines += [f"after {one.name}: {one.count} patch tokens" for one in self.tokens]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Shown: {self.title}, {len(self.sites)} sites>"


def _listed(values: Tensor | None) -> Any:
    """As lists, rounded to what float32 holds of shares."""
    if values is None:
        return None
    if values.is_floating_point():
        values = (values.double() * 1e6).round() / 1e6
    return values.tolist()
