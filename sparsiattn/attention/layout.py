"""Host tensors to ``[B, H, N, D]`` and back: folded heads, windows, shared key heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from einops import rearrange
from torch import Tensor

from sparsiattn.attention.geometry import Grid, Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.packing import PackedPart
from sparsiattn.attention.sdpa import dense_attention
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_order import TokenOrder
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption

# The image size where the host was given patches that were cut and padded beforehand: tokens are
# then a plain sequence, whatever the grid was at patch time.
NO_IMAGE: Grid = (0, 0)

# How hosts lay out a query, in einops' notation: w counts windows, which join the batch.
FORMS = {
    "b h n d": "b h n d",
    "(b h) n d": "b h n d",
    "b w h n d": "(b w) h n d",
    "b h w n d": "(b w) h n d",
    "(b h) w n d": "(b w) h n d",
}


@dataclass(frozen=True)
class Layout:
    """How one site's host lays out its operands.

    Attributes:
        form: A key of `FORMS`, such as ``"b h n d"``.
        heads: Number of heads.

    >>> Layout("(b h) n d", heads=3).fold(torch.zeros(6, 5, 8)).shape
    torch.Size([2, 3, 5, 8])
    """

    form: str
    heads: int

    @classmethod
    def of(cls, shape: torch.Size, heads: int | None) -> Layout | None:
        """The layout of a query of this shape, given the module's head count; None if unknown."""
        if len(shape) == 4:
            # for one image, a first (and not the second) dimension of H means folded heads
            folded = heads is not None and shape[0] == heads > 1 and shape[1] != heads
            return cls("(b h) w n d", shape[0]) if folded else cls("b h n d", shape[1])
        if len(shape) == 3:
            heads = heads or 1
            return cls("(b h) n d", heads) if shape[0] % heads == 0 else None
        if len(shape) == 5 and heads in shape[1:3]:
            return cls("b h w n d" if shape[1] == heads else "b w h n d", heads)
        return None

    def fold(self, x: Tensor) -> Tensor:
        """To ``[B, H, N, D]``."""
        if self.form == "b h n d":
            return x
        sizes = {"h": self.heads} if self.form.startswith("(b h)") else {}
        return rearrange(x, f"{self.form} -> {FORMS[self.form]}", **sizes)

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """``[B, H, N, D]`` back to the form of the host's query."""
        if self.form == "b h n d":
            return x
        folded = self.form.startswith("(b h)")
        sizes = {"b": like.shape[0] // self.heads if folded else like.shape[0]}
        return rearrange(x, f"{FORMS[self.form]} -> {self.form}", **sizes)

    def fold_mask(self, mask: Tensor, q: Tensor) -> Tensor:
        """A host mask to four dimensions that broadcast to ``[B, H, Nq, Nk]``."""
        if self.form == "b h n d":
            return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
        if mask.dim() <= 2 or mask.shape[:-2].numel() == 1:
            return mask.reshape(1, 1, *mask.shape[-2:])
        return self.fold(mask.expand(*q.shape[:-2], *mask.shape[-2:]))


def share_heads(x: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated for the queries that share them (GQA, MQA)."""
    groups = x.shape[1]
    if groups == heads:
        return x
    return x.expand(-1, heads, -1, -1) if groups == 1 else x.repeat_interleave(heads // groups, 1)


def causal_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """The lower triangle as a mask, joined with the host's own."""
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return keep[None, None]
    if mask.dtype == torch.bool:
        return mask & keep
    return mask.masked_fill(~keep, float("-inf"))


def autocast_to(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in the dtype of `autocast_dtype`."""
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


def autocast_dtype(q: Tensor) -> torch.dtype | None:
    """The dtype SDPA would run in under the active autocast; None if there is none."""
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


Maps = tuple[Grid, Grid]
"""Rows and columns of the feature map that tokens come from: now, and at patch time."""


def grids(
    site: Site, n_queries: int, n_keys: int, maps: Maps | None, window: object
) -> tuple[Grid, Grid, bool]:
    """The patch grids of one call.

    At the resolution of patch time they are known. At another resolution they follow the host's
    window, if it has one, else the feature map.

    Args:
        site: The call's site.
        n_queries: Number of queries, prefix included.
        n_keys: Number of keys, prefix included.
        maps: Sizes of the feature map; None where they are not known.
        window: The host's window, if it has one.

    Returns:
        Grids of the patch queries and of the patch keys, and whether both are known.
    """
    queries, keys = n_queries - site.prefix_tokens, n_keys - site.prefix_tokens
    if site.packed:  # without the sizes of its images
        return (1, queries), (1, keys), False
    if isinstance(window, (tuple, list)) and window[0] * window[1] == queries == keys:
        return (window[0], window[1]), (window[0], window[1]), site.raster
    query_grid = patch_grid(site.grid, queries, site, maps)
    key_grid = patch_grid(site.key_grid, keys, site, maps)
    if query_grid is None or key_grid is None:
        return (1, queries), (1, keys), False
    return query_grid, key_grid, True


def patch_grid(known: Grid, n: int, site: Site, maps: Maps | None) -> Grid | None:
    """The grid of ``n`` patch tokens; None where it is not known.

    It is the grid of patch time, scaled as the feature map was, if that gives ``n`` tokens.

    >>> x = torch.zeros(1, 1, 64, 8)
    >>> site = Site.of(x, x, x)
    >>> patch_grid((8, 8), 32, site, ((4, 8), (8, 8))), patch_grid((8, 8), 33, site, None)
    ((4, 8), None)
    """
    if not site.raster or site.packed or (maps is not None and maps[0] == NO_IMAGE):
        return None
    fits = known[0] * known[1] == n
    if maps is None or (fits and (site.windows > 1 or maps[0] == maps[1])):
        return known if fits else None
    (rows, more_rows), (columns, more_columns) = (
        (side * now // then, -(-side * now // then))
        for side, now, then in zip(known, *maps, strict=True)
    )
    # where sizes do not divide, hosts round either way
    for grid in (
        (rows, columns),
        (more_rows, more_columns),
        (more_rows, columns),
        (rows, more_columns),
    ):
        if grid[0] * grid[1] == n:
            return grid
    return None


def stage_grid(n: int, maps: Maps | None) -> Grid | None:
    """The grid of all ``n`` tokens of a stage: the feature map, halved until ``n`` tokens fit.

    >>> stage_grid(196, ((56, 56), (56, 56))), stage_grid(195, ((56, 56), (56, 56)))
    ((14, 14), None)
    """
    rows, columns = (0, 0) if maps is None else maps[0]
    while rows * columns > n:
        rows, columns = -(-rows // 2), -(-columns // 2)
    return (rows, columns) if rows * columns == n else None


@dataclass(frozen=True, eq=False)
class HostCall:
    """Arguments of one call of scaled dot product attention, as the host laid them out.

    Attributes:
        q: Queries, in one of `FORMS`.
        k: Keys.
        v: Values.
        mask: Boolean or additive mask; None if there is none.
        dropout: Probability of dropping an attention weight.
        causal: Whether a causal (lower-triangular) mask applies.
        scale: Factor of QK^T; None for ``head_dim ** -0.5``.
        gqa: Whether queries share key heads (``enable_gqa``).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    gqa: bool = False

    def dense(self) -> Tensor:
        """The result of the host's own attention, in the host's layout."""
        operands = self.q, self.k, self.v, self.mask, self.dropout, self.causal
        return dense_attention(*operands, scale=self.scale, gqa=self.gqa)


class Places(NamedTuple):
    """Where the tokens of a call are in the image.

    Attributes:
        query_grid: Rows and columns of the patch queries, of all views stacked vertically.
        key_grid: The same for the patch keys.
        known: Whether both are known.
        views: Number of images or frames in the query grid.
    """

    query_grid: Grid
    key_grid: Grid
    known: bool
    views: int = 1

    @property
    def shared_views(self) -> int:
        """Number of images or frames among queries and keys alike; 1 if their grids differ."""
        return self.views if self.query_grid == self.key_grid else 1


def canonical(
    site: Site,
    layout: Layout,
    call: HostCall,
    maps: Maps | None,
    *,
    tile_for: Callable[[int, int], Tile] = lambda tokens, views: 1,
    block_for: Callable[[int, Tile, int], Tile] = lambda keys, tile, views: 1,
    depth_for: Callable[[int], int] = lambda views: 1,
    window: object = None,
    token_state: TokenState | None = None,
    part: PackedPart | None = None,
) -> AttentionInputs:
    """The host's arguments of one attention call as `AttentionInputs`.

    Args:
        site: The call's site.
        layout: How its host lays out operands.
        call: The host's arguments.
        maps: Sizes of the feature map that tokens come from.
        tile_for: Gives the tile of queries, from the number of queries and of views.
        block_for: Gives the block of keys, from the number of keys, the tile and the number of
            views.
        depth_for: Gives the number of frames that a tile spans, from the number of views.
        window: The host's window at this call's resolution, if it has one.
        token_state: Which tokens are left.
        part: The image (or clip, or window) of the call, at a site that packs several.
    """
    q, k, mask, dtype = call.q, call.k, call.mask, autocast_dtype(call.q)
    heads_q = autocast_to(layout.fold(q), dtype)
    heads = heads_q.shape[1]
    heads_k, heads_v = (autocast_to(share_heads(layout.fold(x), heads), dtype) for x in (k, call.v))
    if call.causal:
        mask = causal_mask(mask, q, k)
    tokens, keys = heads_q.shape[-2], heads_k.shape[-2]
    places = _places(site, (tokens, keys), maps, window, token_state, part)
    # the tile of a shortened sequence stays that of the whole image
    whole = tokens if not _is_reduced(token_state) else token_state.n_original + site.prefix_tokens
    views = places.shared_views
    tile = tile_for(whole, views) if places.known else 1
    depth = depth_for(views) if tile != 1 else 1
    inputs = AttentionInputs(
        heads_q,
        heads_k,
        heads_v,
        q.shape[-1] ** -0.5 if call.scale is None else call.scale,
        None if mask is None else layout.fold_mask(mask, q),
        site,
        dropout=call.dropout,
        query_grid=places.query_grid,
        key_grid=places.key_grid,
        tile=tile,
        block=block_for(keys, tile, views),
        token_state=token_state,
        placed=places.known,
        views=places.views // depth,
    )
    return _reordered(inputs, part, places, depth)


def _is_reduced(state: TokenState | None) -> TypeGuard[TokenState]:
    return state is not None and state.reduced


def _places(
    site: Site,
    counts: tuple[int, int],
    maps: Maps | None,
    window: object,
    state: TokenState | None,
    part: PackedPart | None,
) -> Places:
    """The places of the queries and keys of a call.

    Args:
        site: As in `canonical`.
        counts: Number of queries and of keys.
        maps: As in `canonical`.
        window: As in `canonical`.
        state: As in `canonical`.
        part: As in `canonical`.
    """
    if _is_reduced(state):
        # the remaining tokens are a plain sequence; the state knows their positions
        grid = 1, counts[0] - site.prefix_tokens
        return Places(grid, grid, site.placed and not site.packed)
    if part is not None:
        return Places(part.stacked_grid, part.stacked_grid, known=True, views=part.frames)
    query_grid, key_grid, known = grids(site, *counts, maps, window)
    views = site.views if query_grid[0] > 1 and query_grid[0] % site.views == 0 else 1
    return Places(query_grid, key_grid, known and site.placed, views)


def _reordered(
    inputs: AttentionInputs, part: PackedPart | None, places: Places, depth: int
) -> AttentionInputs:
    """The same call with special tokens first, and patches in the order of the tiles."""
    site = inputs.site
    moves = site.prefix_tokens > site.leading_tokens
    merge, window = (1, None) if part is None else (part.merge, part.window)
    if not moves and merge == depth == 1 and window is None:
        return inputs
    _check_specials(inputs)
    grid = places.query_grid[0] // places.views, places.query_grid[1]
    sorts = merge > 1 or depth > 1 or window is not None
    orders = [
        TokenOrder(
            tokens,
            site.leading_tokens,
            site.suffix_tokens,
            places.views if sorts else site.views,
            () if site.structure is None else site.structure.specials,
            grid if sorts else None,
            merge,
            window,
            depth,
        )
        for tokens in (inputs.n_queries, inputs.n_keys)
    ]
    queries, keys = orders
    bias = inputs.bias
    if bias is not None and bias.shape[-1] > 1:
        bias = bias.index_select(-1, keys.pick(bias.device))
    if bias is not None and bias.shape[-2] > 1:
        bias = bias.index_select(-2, queries.pick(bias.device))
    q, k, v = queries.apply(inputs.q), keys.apply(inputs.k), keys.apply(inputs.v)
    return inputs.replace(q=q, k=k, v=v, bias=bias, order=queries)


def _check_specials(inputs: AttentionInputs) -> None:
    """Raise `InvalidOption` if the positions of special tokens within views are not known."""
    site = inputs.site
    has_specials = site.structure is not None and site.structure.specials
    if has_specials and inputs.n_queries != site.tokens:
        raise InvalidOption(
            f"site {site.name!r} got {inputs.n_queries} tokens but had {site.tokens} when it was "
            f"patched ({site.structure}), so the positions of its special tokens are not known: "
            "patch with an input= of this size"
        )


def planner_order(x: Tensor, inputs: AttentionInputs) -> Tensor:
    """Queries or results ``[B, H, N, D]`` in the host's order, as planners get them."""
    return x if inputs.order is None else inputs.order.apply(x)


def host_order(out: Tensor, inputs: AttentionInputs) -> Tensor:
    """The result of attention, ``[B, H, N, D]``, with its tokens back in the host's order."""
    return out if inputs.order is None else inputs.order.undo(out)
