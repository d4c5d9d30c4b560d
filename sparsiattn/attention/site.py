"""What strategies and kernels see: the `Site` and the `AttentionInputs` of one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid, Tile, Tiles
from sparsiattn.errors import InvalidOption

if TYPE_CHECKING:
    from sparsiattn.attention.patterns import Pattern
    from sparsiattn.attention.token_state import TokenState
    from sparsiattn.runtime.cross_layer import CrossLayerState

# A finite logit this low (Swin masks with -100) is a mask, not a bias: it weighs e^-50 at most.
MASKED_BELOW = -50.0


@dataclass(frozen=True)
class Site:
    """One attention call of one model, as found at patch time. Sizes are those of one window.

    name: module path, e.g. ``blocks.3.attn``. index, depth: position among the model's sites.
    tokens, keys: queries and keys, prefix included. heads, head_dim, value_dim: H, D and Dv. grid,
    key_grid: rows and columns of the patch tokens, ``(1, n)`` where their order is not a raster.
    prefix_tokens: leading CLS, distillation and register tokens. windows: windows per image. calls:
    attention calls in one forward; shared: if they must agree on their keys. bias: whether the host
    adds a mask, and if that mask can forbid keys (``"mask"``) or only favours some (``"bias"``).
    halo: by how many patches the keys reach beyond the queries on every side (halo attention).
    """

    name: str
    index: int
    depth: int
    tokens: int
    keys: int
    heads: int
    head_dim: int
    value_dim: int
    grid: Grid
    key_grid: Grid
    prefix_tokens: int = 0
    windows: int = 1
    raster: bool = True
    calls: int = 1
    shared: bool = False
    bias: Literal["none", "bias", "mask"] = "none"
    halo: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of QK^T and AV for one image, dense."""
        pairs = self.tokens * self.keys * self.heads * self.windows * self.calls
        return pairs * (self.head_dim + self.value_dim)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, prefix_tokens: int = 0, **fields: Any) -> Site:
        """A site that fits the given tensors; for tests and for use outside a model.

        >>> x = torch.zeros(1, 2, 17, 8)
        >>> Site.of(x, x, x, prefix_tokens=1).grid
        (4, 4)
        """
        n, m = q.shape[-2] - prefix_tokens, k.shape[-2] - prefix_tokens
        known = {
            "name": "attn",
            "index": 0,
            "depth": 1,
            "tokens": q.shape[-2],
            "keys": k.shape[-2],
            "heads": q.shape[1],
            "head_dim": q.shape[-1],
            "value_dim": v.shape[-1],
            "grid": geometry.infer_grid(n),
            "key_grid": geometry.infer_grid(m),
            "prefix_tokens": prefix_tokens,
        }
        return cls(**{**known, **fields})


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The operands of one attention call, heads and windows in canonical order.

    q: ``[B, H, Nq, D]``; k: ``[B, H, Nk, D]``; v: ``[B, H, Nk, Dv]``. Windows are folded into
    ``B``, shared key heads are expanded. scale: factor of QK^T. dropout: of attention weights, 0 in
    eval mode. bias: additive float mask or
    boolean mask (True attends) that broadcasts to ``[B, H, Nq, Nk]``. grid, key_grid: of the patch
    tokens at this call's resolution; taken from ``site`` when None. tile: queries that share keys.
    block: keys that are kept or dropped together. stream: which original patches the tokens are,
    where some were dropped or merged; None before. runs_on: the device that a dry run's tensors,
    which hold no data, stand for. notes: what `keep` and `recall` write to and read from.

    >>> x = torch.zeros(1, 2, 17, 8)
    >>> inputs = AttentionInputs(x, x, x, 8**-0.5, None, Site.of(x, x, x, prefix_tokens=1))
    >>> inputs.n_keys, inputs.query_grid
    (17, (4, 4))
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    site: Site
    dropout: float = 0.0
    grid: Grid | None = None
    key_grid: Grid | None = None
    tile: Tile = 1
    block: Tile = 1
    token_state: TokenState | None = None
    target_device: torch.device | None = None
    notes: CrossLayerState | None = None

    @property
    def device(self) -> torch.device:
        """Where the call runs; in a dry run, where it would."""
        return self.q.device if self.target_device is None else self.target_device

    @property
    def prefix(self) -> int:
        """Leading tokens that are not image patches, among queries and keys alike."""
        return self.site.prefix_tokens

    @property
    def n_queries(self) -> int:
        return self.q.shape[-2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[-2]

    @property
    def query_grid(self) -> Grid:
        return self.grid or self.site.grid

    @property
    def image_grid(self) -> Grid:
        """Of all patch tokens of the image, those that were dropped or merged included."""
        reduced = self.token_state is not None and self.token_state.reduced
        return self.token_state.grid if reduced and self.token_state is not None else self.key_grid

    def gather_rows(self, table: Tensor) -> Tensor:
        """Rows of a table ``[P + n0, K]`` over the whole grid for the tokens that are left: ``[B,
        P + n, K]``; the table itself, ``[P + n0, K]``, while all are."""
        if self.token_state is None or not self.token_state.reduced:
            return table
        rows = self.token_state.rows(table[self.prefix :])
        return torch.cat([table[: self.prefix].expand(rows.shape[0], -1, -1), rows], dim=1)

    @property
    def key_grid(self) -> Grid:
        return self.key_grid or self.site.key_grid

    def table(self, build: Callable[..., Tensor], *key: Hashable) -> Tensor:
        """``build(*key, device=...)`` on the keys' device, kept for later calls with equal
        arguments: for index tables and masks that follow from shapes and options alone. ``build``
        must be a function of a module, and nobody may write to what it made.

        >>> from sparsiattn.testing.hosts import random_inputs
        >>> random_inputs((4, 4)).table(torch.arange, 3).tolist()
        [0, 1, 2]
        """
        return geometry.table(build, *key, device=self.k.device)

    @property
    def tiles(self) -> Tiles | None:
        """The query tiles over patch tokens (prefix not counted), None if every query is alone."""
        if self.tile == 1 or isinstance(self.tile, int):
            return None
        return geometry.table(geometry.tiles, self.query_grid, self.tile, device=self.q.device)

    @property
    def blocks(self) -> Tiles | None:
        """The blocks in which patch keys are chosen, None if each is chosen by itself (as under a
        host mask that forbids some)."""
        if isinstance(self.block, int) or isinstance(self.tile, int) or self.allowed() is not None:
            return None
        return geometry.table(geometry.tiles, self.key_grid, self.block, device=self.k.device)

    @property
    def patch_queries(self) -> Tensor:
        """``[B, H, n, D]``: the queries without prefix tokens."""
        return self.q[..., self.prefix :, :]

    @property
    def row_queries(self) -> Tensor:
        """One query per row of a pattern: the patch queries, or their mean over each tile, without
        padding."""
        tiles, weight = self.tiles, self._unpadded
        if tiles is None:
            return self.patch_queries
        if weight is None:
            return tiles.mean(self.patch_queries)
        return tiles.mean(self.patch_queries * weight) / tiles.mean(weight).clamp_min(1e-6)

    @property
    def mean_query(self) -> Tensor:
        """``[B, H, 1, D]``: of all rows, without padding."""
        weight = self._unpadded
        if weight is None:
            return self.row_queries.mean(-2, keepdim=True)
        total = (self.patch_queries * weight).sum(-2, keepdim=True)
        return total / weight.sum(-2, keepdim=True).clamp_min(1.0)

    @property
    def seen(self) -> Tensor | None:
        """Keys that any query may see, ``[B|1, H|1, Nk]``; None means all. Padding is not seen."""
        allowed = self.allowed()
        if allowed is None:
            return None
        return allowed.expand(*allowed.shape[:-1], self.n_keys).any(-2)

    @property
    def _unpadded(self) -> Tensor | None:
        """One for every patch query that is seen as a key, ``[B|1, H|1, n, 1]``; None means all."""
        seen = self.seen if self.n_queries == self.n_keys else None
        return None if seen is None else seen[..., self.prefix :, None].to(self.q.dtype)

    def logits(self, rows: Tensor | None = None) -> Tensor:
        """Scaled QK^T with the host's bias, ``[B, H, Nq, Nk]``, float32 for float16 operands;
        forbidden keys at -inf. rows: indices of the queries to compute, all if None."""
        q, bias = self.q, self.bias
        if rows is not None:
            q = q.index_select(-2, rows)
            if bias is not None and bias.shape[-2] > 1:
                bias = bias.index_select(-2, rows)
        return _add_bias(products(q, self.k, self.scale), bias)

    def biased(self, logits: Tensor) -> Tensor:
        """Logits ``[B|1, H|1, Nq, Nk]`` with the host's bias; forbidden keys at -inf."""
        return _add_bias(logits, self.bias)

    def attention(self, pattern: Pattern | None = None) -> Tensor:
        """What torch's attention returns by a plan, dense without one: ``[B, H, Nq, Dv]``. For
        planners' losses."""
        from sparsiattn.attention.patterns import Pattern as Plan
        from sparsiattn.kernels.sdpa import MaskedSDPA

        return MaskedSDPA()(self, pattern or Plan.dense(self.n_queries, self.n_keys))

    def keep(self, name: str, tensor: Tensor) -> None:
        """Leave a tensor for later sites of this forward pass, in place of an earlier one of that
        name. The strategy must say ``carries = True``, or `InvalidOption` is raised."""
        self._notes().keep(name, tensor)

    def recall(self, name: str, shape: Sequence[int] | None = None) -> Tensor | None:
        """What an earlier site of this forward pass left under that name, if it has that shape;
        None where there is no such thing, as in a block that runs alone, or between images that
        carry different numbers of tokens."""
        found = self._notes().recall(name)
        return None if found is None or (shape and found.shape != tuple(shape)) else found

    def _notes(self) -> CrossLayerState:
        if self.notes is None:
            raise InvalidOption(
                f"site {self.site.name!r} has no notes to keep or recall: set carries = True on "
                "the strategy (outside a model, pass cross_layer=)"
            )
        return self.notes

    def allowed(self) -> Tensor | None:
        """Keys the host lets a query see, broadcastable to ``[B, H, Nq, Nk]``; None means all."""
        if self.bias is None:
            return None
        if self.bias.dtype == torch.bool:
            return self.bias
        return None if self.site.bias == "bias" else self.bias > MASKED_BELOW

    def replace(self, **fields: Any) -> AttentionInputs:
        return replace(self, **fields)


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``q @ k.mT * scale``; for float16 in float32, as large logits are beyond float16."""
    if q.dtype == torch.float16:
        return (q.float() * scale) @ k.float().mT
    return q @ k.mT * scale


def _add_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return logits
    if bias.dtype == torch.bool:
        return logits.masked_fill(~bias, float("-inf"))
    return logits + bias.to(logits.dtype)
