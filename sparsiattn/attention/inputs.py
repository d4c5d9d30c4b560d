"""`AttentionInputs`: the operands of one attention call, as strategies and kernels see them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.background import Summary
from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.geometry import Grid, Tile, Tiles
from sparsiattn.attention.logits import add_bias, products
from sparsiattn.attention.sdpa import differentiable_attention
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_order import TokenOrder
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption, RenamedMembers

# A finite logit this low (Swin masks with -100) is a mask, not a bias: its weight is e^-50 at most.
MASKED_BELOW = -50.0


class CanAttend(Protocol):
    """The method that `AttentionInputs.attention` calls on a pattern."""

    def attend(self, inputs: AttentionInputs) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class AttentionInputs(RenamedMembers):
    """The operands of one attention call, heads and windows in canonical order.

    Windows are folded into the batch, shared key heads are expanded.

    Attributes:
        q: Queries ``[B, H, Nq, D]``.
        k: Keys ``[B, H, Nk, D]``.
        v: Values ``[B, H, Nk, Dv]``.
        scale: Factor of QK^T.
        bias: Additive float mask or boolean mask (True attends) that broadcasts to
            ``[B, H, Nq, Nk]``; None where the host adds none.
        site: The call's site, as found at patch time.
        dropout: Dropout probability of attention weights; 0 in eval mode.
        query_grid: Rows and columns of the patch queries at this call's resolution; by default
            that of ``site``.
        key_grid: The same for the patch keys.
        tile: Queries that share their keys: 1, or rows and columns of patches.
        block: Keys that are kept or dropped together: 1, or rows and columns of patches.
        token_state: Which original patches the tokens are, once some were dropped or merged;
            None before the first reduction.
        target_device: The device that a dry run's meta tensors stand for.
        cross_layer: Tensors that `store` writes and `load` reads; None where the strategy does
            not use them.
        placed: Whether the positions of the tokens in the image are known, so that the grids
            have a meaning.
        views: Number of images or frames in the sequence, stacked vertically in the grids; by
            default that of ``site``, if it divides the query grid.
        order: How the order of the queries differs from the host's; None if it does not.

    >>> x = torch.zeros(1, 2, 17, 8)
    >>> inputs = AttentionInputs(x, x, x, 8**-0.5, None, Site.of(x, x, x, prefix_tokens=1))
    >>> inputs.n_keys, inputs.query_grid
    (17, (4, 4))
    """

    renamed_members: ClassVar[Mapping[str, str]] = {
        "follow": "gather_rows",
        "seen": "visible_keys",
        "keep": "store",
        "recall": "load",
        "runs_on": "target_device",
        "keys_grid": "key_grid",
        "notes": "cross_layer",
        "stream": "token_state",
        "whole_grid": "image_grid",
    }

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    site: Site
    dropout: float = 0.0
    query_grid: Grid = None  # type: ignore[assignment]
    key_grid: Grid = None  # type: ignore[assignment]
    tile: Tile = 1
    block: Tile = 1
    token_state: TokenState | None = None
    target_device: torch.device | None = None
    cross_layer: CrossLayerState | None = None
    placed: bool = True
    views: int = 0
    order: TokenOrder | None = None

    def __post_init__(self) -> None:
        for name, known in (("query_grid", self.site.grid), ("key_grid", self.site.key_grid)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, known)
        if not self.views:
            views = self.site.views
            fits = self.query_grid[0] % views == 0 and self.query_grid[0] > 1
            object.__setattr__(self, "views", views if fits else 1)

    @property
    def device(self) -> torch.device:
        """The device of the call; in a dry run, the device that it would run on."""
        return self.target_device or self.q.device

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are not image patches, the same for queries and keys."""
        return self.site.prefix_tokens

    @property
    def n_queries(self) -> int:
        """Number of queries, prefix included."""
        return self.q.shape[-2]

    @property
    def n_keys(self) -> int:
        """Number of keys, prefix included."""
        return self.k.shape[-2]

    @property
    def reduced(self) -> TokenState | None:
        """The token state if tokens were dropped or merged, else None."""
        state = self.token_state
        return state if state is not None and state.reduced else None

    @property
    def key_views(self) -> int:
        """Number of images or frames among the keys; 1 if keys and queries have different grids."""
        return self.views if self.key_grid == self.query_grid else 1

    @property
    def image_grid(self) -> Grid:
        """Grid of all patch tokens of the image, including those that were dropped or merged."""
        return self.key_grid if self.reduced is None else self.reduced.grid

    def gather_rows(self, table: Tensor) -> Tensor:
        """Rows of a table over the whole image, for the current tokens.

        Args:
            table: ``[P + n0, K]``, one row per prefix token and per patch of the image.

        Returns:
            ``[B, P + n, K]``, where a merged token gets the mean of its rows; the table itself
            before the first reduction.
        """
        if self.reduced is None:
            return table
        rows = self.reduced.rows(table[self.prefix :])
        return torch.cat([table[: self.prefix].expand(rows.shape[0], -1, -1), rows], dim=1)

    def table(self, build: Callable[..., Tensor], *key: Hashable) -> Tensor:
        """``build(*key, device=...)`` on the keys' device, cached for later calls.

        For index tables and masks that depend on shapes and options only.

        Args:
            build: A module-level function. Its result is shared, so do not write to it.
            *key: Arguments of ``build``, which also identify the table.

        >>> from sparsiattn.testing.hosts import random_inputs
        >>> random_inputs((4, 4)).table(torch.arange, 3).tolist()
        [0, 1, 2]
        """
        return geometry.table(build, *key, device=self.k.device)

    @property
    def tiles(self) -> Tiles | None:
        """The tiles of patch queries (prefix not counted); None if each query has its own keys."""
        if self.tile == 1 or isinstance(self.tile, int):
            return None
        sizes = self.query_grid, self.tile, self.views
        return geometry.table(geometry.tiles, *sizes, device=self.q.device)

    @property
    def blocks(self) -> Tiles | None:
        """The blocks in which patch keys are chosen.

        None if keys are chosen one by one, as under a host mask that forbids some of them.
        """
        if isinstance(self.block, int) or isinstance(self.tile, int) or self.allowed() is not None:
            return None
        sizes = self.key_grid, self.block, self.key_views
        return geometry.table(geometry.tiles, *sizes, device=self.k.device)

    @property
    def patch_queries(self) -> Tensor:
        """The queries without prefix tokens, ``[B, H, n, D]``."""
        return self.q[..., self.prefix :, :]

    @property
    def row_queries(self) -> Tensor:
        """One query per row of a pattern, ``[B, H, R, D]``: patch queries, or their mean per tile.

        Padding does not enter the means.
        """
        tiles, weight = self.tiles, self._unpadded
        if tiles is None:
            return self.patch_queries
        if weight is None:
            return tiles.mean(self.patch_queries)
        return tiles.mean(self.patch_queries * weight) / tiles.mean(weight).clamp_min(1e-6)

    @property
    def mean_query(self) -> Tensor:
        """The mean over all patch queries except padding, ``[B, H, 1, D]``."""
        weight = self._unpadded
        if weight is None:
            return self.row_queries.mean(-2, keepdim=True)
        total = (self.patch_queries * weight).sum(-2, keepdim=True)
        return total / weight.sum(-2, keepdim=True).clamp_min(1.0)

    @property
    def visible_keys(self) -> Tensor | None:
        """Keys that at least one query may attend to, ``[B|1, H|1, Nk]``; None means all.

        Padding is not among them.
        """
        allowed = self.allowed()
        if allowed is None:
            return None
        return allowed.expand(*allowed.shape[:-1], self.n_keys).any(-2)

    @property
    def _unpadded(self) -> Tensor | None:
        """1 for each patch query that is visible as a key, ``[B|1, H|1, n, 1]``; None means all."""
        visible = self.visible_keys if self.n_queries == self.n_keys else None
        return None if visible is None else visible[..., self.prefix :, None].to(self.q.dtype)

    def logits(self, rows: Tensor | None = None) -> Tensor:
        """Scaled QK^T with the host's bias, forbidden keys at -inf.

        Args:
            rows: Indices of the queries to compute; None for all.

        Returns:
            ``[B, H, Nq, Nk]``, float32 for float16 operands.
        """
        q, bias = self.q, self.bias
        if rows is not None:
            q = q.index_select(-2, rows)
            if bias is not None and bias.shape[-2] > 1:
                bias = bias.index_select(-2, rows)
        return add_bias(products(q, self.k, self.scale), bias)

    def biased(self, logits: Tensor) -> Tensor:
        """Logits ``[B|1, H|1, Nq, Nk]`` with the host's bias; forbidden keys at -inf."""
        return add_bias(logits, self.bias)

    def attention(self, pattern: CanAttend | None = None) -> Tensor:
        """Attention computed by torch's SDPA, ``[B, H, Nq, Dv]``; for the losses of planners.

        Args:
            pattern: The pairs that survive; None for all.
        """
        return self.masked_attention() if pattern is None else pattern.attend(self)

    def attention_mask(
        self, keep: Tensor, summary_rows: Tensor | None = None, *, rows_can_be_empty: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Combine the surviving pairs with the host's mask, and find rows without any key.

        Such dead rows are unmasked, so that neither softmax nor its gradient is NaN; callers set
        their output to zero.

        Args:
            keep: Boolean ``[B|1, H|1, Nq, Nk]``, the surviving pairs.
            summary_rows: Logits of the pooled keys, ``[B|1, H|1, Nq, G]``.
            rows_can_be_empty: Whether ``keep`` alone may leave a row without a key.

        Returns:
            A boolean or additive mask ``[B|1, H|1, Nq, Nk (+ G)]`` with the pooled keys in the
            last G columns, and ``dead`` ``[B|1, H|1, Nq, 1]`` (None if no row can be dead).
        """
        keep, dead = keep.to(self.q.device), None
        allowed = self.allowed()
        if allowed is not None:
            keep = keep & allowed
        if allowed is not None or rows_can_be_empty:
            alive = keep.any(-1, keepdim=True)
            if summary_rows is not None:
                alive = alive | (summary_rows > float("-inf")).any(-1, keepdim=True)
            dead, keep = ~alive, keep | ~alive
        additive = self.bias if self.bias is not None and self.bias.dtype != torch.bool else None
        if additive is None and summary_rows is None:
            return keep, dead
        mask = torch.zeros_like(keep, dtype=self.q.dtype).masked_fill(~keep, float("-inf"))
        if additive is not None:
            mask = mask + additive.to(mask.dtype)
        if summary_rows is not None:
            lead = torch.broadcast_shapes(mask.shape[:-1], summary_rows.shape[:-1])
            parts = mask.expand(*lead, -1), summary_rows.to(mask.dtype).expand(*lead, -1)
            mask = torch.cat(parts, dim=-1)
        return mask, dead

    def masked_attention(
        self,
        mask: Tensor | None = None,
        dead: Tensor | None = None,
        summary: Summary | None = None,
    ) -> Tensor:
        """Attention by torch's SDPA with the masks of `attention_mask`; dense without them.

        Args:
            mask: Boolean or additive; None for the host's own.
            dead: Rows without any key; their output is zero.
            summary: Pooled keys to append to the keys.

        Returns:
            ``[B, H, Nq, Dv]``.
        """
        if mask is None:
            if self.allowed() is None:
                mask = self.bias
            else:  # the host may forbid every key of a row
                mask, dead = self.attention_mask(self.k.new_ones(1, 1, 1, 1, dtype=torch.bool))
        k, v = self.k, self.v
        if summary is not None:
            k, v = (torch.cat([x, summary.pool(x)], dim=-2) for x in (k, v))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(self.q.dtype)
        out = differentiable_attention(self.q, k, v, mask, self.dropout, scale=self.scale)
        return out if dead is None else out.masked_fill(dead, 0.0)

    def store(self, name: str, tensor: Tensor) -> None:
        """Store a tensor for later sites of this forward pass.

        It replaces an earlier one of that name. The strategy must set
        ``uses_cross_layer_state = True``.

        Raises:
            InvalidOption: The strategy does not set it.
        """
        self._cross_layer().store(name, tensor)

    def load(self, name: str, shape: Sequence[int] | None = None) -> Tensor | None:
        """The tensor that an earlier site of this forward pass stored under that name.

        Args:
            name: The name passed to `store`.
            shape: The required shape; a tensor of another shape counts as missing.

        Returns:
            The tensor; None if there is none, as in a block that runs on its own, or where images
            carry different numbers of tokens.
        """
        tensor = self._cross_layer().load(name)
        return None if tensor is None or (shape and tensor.shape != tuple(shape)) else tensor

    def _cross_layer(self) -> CrossLayerState:
        if self.cross_layer is None:
            raise InvalidOption(
                f"site {self.site.name!r} can neither store nor load: set "
                "uses_cross_layer_state = True on the strategy (outside a model, pass "
                "cross_layer=)"
            )
        return self.cross_layer

    def require_shape(self, name: str, x: Tensor, shape: Sequence[int | str]) -> None:
        """Raise `InvalidOption` unless ``x`` has that shape; a string stands for any size."""
        sizes = zip(x.shape, shape, strict=False)
        if x.dim() != len(shape) or any(isinstance(b, int) and a != b for a, b in sizes):
            raise self._misfit(name, x, shape)

    def require_broadcast(self, name: str, x: Tensor, shape: Sequence[int]) -> None:
        """Raise `InvalidOption` unless ``x`` has four dimensions that broadcast to that shape."""
        if x.dim() != 4 or any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
            raise self._misfit(name, x, shape)

    def _misfit(self, name: str, x: Tensor, shape: Sequence[int | str]) -> InvalidOption:
        sizes, hint = ", ".join(map(str, shape)), ""
        if name in ("q", "bias"):
            hint = "; only patch queries count here, without the prefix tokens"
        return InvalidOption(
            f"site {self.site.name!r} needs {name} of shape [{sizes}], got {tuple(x.shape)}{hint}"
        )

    def allowed(self) -> Tensor | None:
        """Pairs that the host allows, broadcastable to ``[B, H, Nq, Nk]``; None means all."""
        if self.bias is None:
            return None
        if self.bias.dtype == torch.bool:
            return self.bias
        return None if self.site.bias == "bias" else self.bias > MASKED_BELOW

    def replace(self, **fields: Any) -> AttentionInputs:
        """A copy with some fields changed."""
        return replace(self, **fields)
