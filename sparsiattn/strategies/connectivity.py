"""Learned connectivity (Sparsifiner, CVPR 2023, arXiv 2303.13755): predicted keys, per image."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.budget import blocks_within
from sparsiattn.attention.derivatives import is_tracing, is_transformed
from sparsiattn.attention.geometry import Grid, Sides, Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.logits import products
from sparsiattn.attention.pattern import Pattern, Ranked
from sparsiattn.attention.site import Site
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.errors import InvalidOption, renamed_property
from sparsiattn.kernels.native import scores as native
from sparsiattn.strategies.base import Budgets, LearnedPlanner, Strategy, spawn
from sparsiattn.strategies.basis import (
    basis_cells,
    channel_maps,
    fit_channel_maps,
    initial_tables,
    pooled_by_block,
    unit_grid,
)
from sparsiattn.strategies.config import with_renamed_options
from sparsiattn.strategies.predictor import (
    KnownTables,
    ResizedTables,
    bounded_exp,
    exact_rows,
    for_heads,
    largest,
    number_from,
    sizes_above,
    with_own_keys,
    without_hidden_keys,
)

SCORES = ("auto", "exact", "predictor")
PREDICTOR_OPTIONS = (
    "tokens_per_basis",
    "basis",
    "channels",
    "basis_threshold",
    "basis_coef_topk",
    "head_scale",
    "mean_query_boost",
    "self_weight",
)
MAX_COLUMNS = 65_536  # of a predictor; larger values are mistakes


@with_renamed_options(own="self_weight", salience="mean_query_boost", reduce="tokens_per_basis")
@dataclass(frozen=True)
class Connectivity(Strategy):
    """Keys by a predicted score: softmax(Q (W_down K)^T) W_up (Sparsifiner, section 3).

    It needs no training: until the predictor is fitted, the keys with the largest logits are kept,
    at no higher cost. W_down starts as average pooling over the token grid and W_up as bilinear
    interpolation back, so the predicted score starts as attention at low resolution.

    Args:
        k: Share or count of the keys, one for all sites, a list, or a function of the `Site`.
        scores: What ranks the keys. ``"predictor"`` is the published method. ``"exact"`` uses the
            logits of every query, and votes in tiles (see `TopLogits`). ``"auto"`` is ``"exact"``
            until the predictor is trained, loaded, or calibrated with a better result; it is
            ``"predictor"`` if any of the predictor's options below is set.
        block: Keys that are kept together if there are tiles. With ``"auto"`` the predictor chooses
            blocks of 4 x 4 (2 x 2 below 128 kept keys), and votes choose single keys. The kernels
            ``flex`` and ``xformers`` need blocks.
        tokens_per_basis: Patch tokens per basis vector. None is 6, as in the paper, below 1,024
            tokens and 16 from there on.
        basis: Number of basis vectors; replaces ``tokens_per_basis``.
        channels: Width to which queries and keys are projected first (the authors use half the
            head dim), None for no projection.
        basis_threshold: Entries of abs(W_up) of at most this value are set to zero.
        basis_coef_topk: Number of coefficients kept per query, None for all.
        head_scale: Divide logits by the square root of the head *count*, as the authors' code does,
            instead of the head dim.
        mean_query_boost: Multiply scores by how much more attention the mean query pays to a key
            than low resolution predicts. This cheap step is not in the paper.
        self_weight: Extra share of its attention that a query gives to its own key, before
            calibration; None for the paper's rule. This is not in the paper either: low resolution
            cannot distinguish a query's own key from others in its cell.
        background: As in `Strategy`.

    >>> Connectivity(k=0.1).to_dict()["name"]
    'connectivity'
    """

    name = "connectivity"
    paper = "https://arxiv.org/abs/2303.13755"
    fidelity = (
        "as published with tile=1, background=None, self_weight=None (see load_sparsifiner); tiles,"
        " summary keys and the start without training are this library's"
    )

    supports_frames = True
    k: Budgets = 0.25
    scores: str = field(default="auto", kw_only=True)
    block: int | Sides | str = field(default="auto", kw_only=True)
    tokens_per_basis: float | None = None
    basis: int | None = None
    channels: int | None = None
    basis_threshold: float = 0.0
    basis_coef_topk: int | None = None
    head_scale: bool = False
    mean_query_boost: bool = True
    self_weight: float | None = 0.1
    background: int | str | None = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tokens_per_basis", 1), ("self_weight", 0)):
            value = getattr(self, name)
            if value is not None and not number_from(value, least):
                raise InvalidOption(f"{name} must be None or a number >= {least}, got {value!r}")
        if not number_from(self.basis_threshold, 0):
            raise InvalidOption(f"basis_threshold must be >= 0, got {self.basis_threshold!r}")
        for name in ("basis", "channels", "basis_coef_topk"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_COLUMNS):
                raise InvalidOption(
                    f"{name} must be None or an int in 1..{MAX_COLUMNS}, got {value!r}"
                )
        if self.scores not in SCORES:
            raise InvalidOption(f"scores must be one of {', '.join(SCORES)}, got {self.scores!r}")

    def planner(self, site: Site) -> ConnectivityPlanner:
        return ConnectivityPlanner(self, site)

    @property
    def asks_for_predictor(self) -> bool:
        """Whether the options select the predictor, fitted or not."""
        predictor_fields = (f for f in fields(self) if f.name in PREDICTOR_OPTIONS)
        is_set = any(getattr(self, f.name) != f.default for f in predictor_fields)
        return self.scores == "predictor" or (self.scores == "auto" and is_set)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Connectivity:
        # files without this option are older than it, and used the predictor
        return super().from_dict({**saved, "options": {"scores": "predictor", **saved["options"]}})


class ConnectivityPlanner(LearnedPlanner):
    """The mask predictor of one site; its weights are shared by all heads.

    Attributes:
        down: W_down, ``[U, K]`` for ``U`` units (keys or key blocks, prefix keys first) and ``K``
            basis vectors.
        up: W_up, ``[U, K]``.
        self_weight: ``[1]``; None if the strategy's is None, or if queries and keys are different
            tokens.
        project_q: Channel map of queries, ``[c, D]``; None without ``channels``.
        project_k: Channel map of keys, ``[c, D]``; None without ``channels``.
        grid: Rows and columns of the units that the tables were made for.
        prefix: Number of prefix keys.
    """

    renamed_weights: ClassVar[Mapping[str, str]] = {"own": "self_weight"}
    own = renamed_property("own", "self_weight")

    def __init__(self, strategy: Connectivity, site: Site) -> None:
        super().__init__()
        self.strategy = strategy
        block, depth = (
            strategy.block_for(site.keys, views=site.views),
            strategy.depth_for(site.views),
        )
        self.grid = unit_grid(site.key_grid, block, site.views // depth)
        self.prefix = site.prefix_tokens
        self.cells = basis_cells(site.key_grid, strategy.tokens_per_basis, strategy.basis)
        down, up = self._initial_tables()
        self.down = nn.Parameter(down.clone(), requires_grad=False)
        self.up = nn.Parameter(up.clone(), requires_grad=False)
        self.self_weight: nn.Parameter | None = None
        weight = strategy.self_weight
        if weight is not None and site.key_grid == site.grid and site.keys == site.tokens:
            # one element, not a scalar, because FSDP cannot shard scalars
            self.self_weight = nn.Parameter(torch.tensor([float(weight)]), requires_grad=False)
        self.project_q: nn.Linear | None = None
        self.project_k: nn.Linear | None = None
        if strategy.channels is not None:
            generator = spawn(zlib.crc32(site.name.encode()))
            maps = channel_maps(site.head_dim, strategy.channels, generator)
            self.project_q, self.project_k = maps
        self._resized = ResizedTables()
        self._asked = strategy.asks_for_predictor
        self._start, self._fitted = KnownTables(self._initial_tables), False

    def _initial_tables(self) -> tuple[Tensor, Tensor]:
        return initial_tables(self.grid, self.prefix, self.cells, self.strategy.basis)

    def is_fitted(self) -> bool:
        """Whether the tables differ from those of an untrained predictor."""
        # a traced or transformed call has no values to compare
        traced = torch.compiler.is_compiling() or is_tracing() or is_transformed()
        if not (traced or self.down.is_meta):
            fitted = not self._start.equals(self.down, self.up)
            if fitted != self._fitted:  # setting attributes of modules is slow
                self._fitted = fitted
        return self._fitted

    def note_weights(self) -> None:
        self.is_fitted()

    def forward(self, inputs: AttentionInputs) -> Pattern:
        k = self.strategy.budget_for(inputs.n_keys)
        if not self.predicts:
            return self._best_keys(inputs)
        count, blocks = 0, inputs.blocks
        if blocks is not None:
            count = blocks_within(k, inputs.n_keys, inputs.prefix, blocks)
        compiled = self._compiled(inputs, count)
        if compiled is None:
            return Pattern.top(self.scores(inputs), k)
        scores, best = compiled
        rows, keys = scores.shape[-2:]
        return Ranked(rows, keys, scores=scores, k=k, best=best if count else None)

    @property
    def plans_by_shape(self) -> bool:
        """Whether the kernel ranks keys, by the queries' own logits."""
        return not self.predicts

    @property
    def predicts(self) -> bool:
        """Whether the predictor ranks keys, instead of the queries' own logits."""
        return self.strategy.scores != "exact" and (self._asked or self.is_fitted())

    def unfitted_plan(self, inputs: AttentionInputs) -> Pattern | None:
        can_rank = self.strategy.scores == "auto" and not self._asked
        return self._best_keys(inputs) if can_rank else None

    def _best_keys(self, inputs: AttentionInputs) -> TopLogits:
        k = self.strategy.budget_for(inputs.n_keys)
        return TopLogits.of(inputs, k, in_blocks=self.strategy.block != "auto")

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Predicted connectivity, ``[B, H, R, n]``.

        One row per patch query or tile, one column per key, or per block of patch keys.
        """
        compiled = self._compiled(inputs, 0)
        if compiled is not None:
            return compiled[0]
        down, up = self._tables(inputs)
        units, down = self._units(inputs), without_hidden_keys(down, inputs)
        rows = inputs.row_queries
        threshold = self.strategy.basis_threshold
        basis = sizes_above(up, threshold).to(rows.dtype) if threshold else None
        # each table is converted once, and the absolute value of a rounded number is the same
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        coefficients = self.coefficients(inputs, rows, units, down)
        coefficients = largest(coefficients, self.strategy.basis_coef_topk)
        basis = up.abs() if basis is None else basis
        basis = basis if inputs.blocks is None else basis[..., self.prefix :, :]
        scores = coefficients @ for_heads(basis).mT
        if self.strategy.mean_query_boost:
            # in float32, to which torch converts the scores on the way
            scores = scores * self._boost(inputs, rows, units, down, up)
        if self.self_weight is None or inputs.n_queries != inputs.n_keys:
            return scores
        return with_own_keys(scores, inputs, self.self_weight)

    def _compiled(self, inputs: AttentionInputs, count: int) -> tuple[Tensor, Tensor] | None:
        """Scores of blocks and the indices of the ``count`` best ones, from compiled code.

        None if compiled code does not support the call: it has only the options `self_weight` and
        `mean_query_boost`, and no masks, dropped or merged tokens, or gradients.
        """
        tiles, blocks, strategy = inputs.tiles, inputs.blocks, self.strategy
        if tiles is None or blocks is None or inputs.bias is not None or self.project_q is not None:
            return None
        (down, up), top = self._tables(inputs), strategy.basis_coef_topk
        weight = self.self_weight if inputs.n_queries == inputs.n_keys else None
        if down.dim() != 2 or (top is not None and top < down.shape[-1]):
            return None
        if not native.serves(inputs.q, inputs.k, down, up, *(() if weight is None else (weight,))):
            return None
        return native.block_scores(
            inputs.q,
            inputs.k,
            tiles,
            blocks,
            (down, up),
            weight,
            None if weight is None else self._own_shares(inputs, inputs.block),
            self.prefix,
            (inputs.scale, self._scale(inputs)),
            strategy.basis_threshold,
            strategy.mean_query_boost,
            count,
        )

    def _units(self, inputs: AttentionInputs) -> Tensor:
        """The keys, or prefix keys and the mean of every block, ``[B, H, U, D]``."""
        blocks = inputs.blocks
        return inputs.k if blocks is None else pooled_by_block(inputs.k, blocks, self.prefix)

    def _own_shares(self, inputs: AttentionInputs, block: Tile) -> Tensor:
        """The share of each tile's tokens that each key or block makes up, ``[T, U]``."""
        sizes = inputs.query_grid, inputs.tile, block, inputs.views
        return inputs.table(geometry.own_shares, *sizes)

    def _boost(
        self, inputs: AttentionInputs, rows: Tensor, units: Tensor, down: Tensor, up: Tensor
    ) -> Tensor:
        """How much more attention the mean query pays to a key than low resolution predicts.

        Returns:
            Factors for each key (or block), ``[B, H, 1, n]``: large for keys that stand out in
            their cell for any query.
        """
        # the mean of row queries, unless some of them are padding
        shown = inputs.visible_keys is None
        mean = (rows.mean(-2, keepdim=True) if shown else inputs.mean_query) * inputs.scale
        exact = mean @ units.mT
        low, blocks = (exact @ for_heads(down) @ for_heads(up).mT).float(), inputs.blocks
        if blocks is None:
            return bounded_exp(exact - low)
        logits = mean @ inputs.k[..., self.prefix :, :].mT
        above = blocks.gather(logits.mT).squeeze(-1) - low[..., self.prefix :].mT
        return blocks.weigh(bounded_exp(above)).unsqueeze(-2)

    def coefficients(
        self, inputs: AttentionInputs, rows: Tensor, units: Tensor, down: Tensor
    ) -> Tensor:
        """Softmax over the basis for every row, ``[B, H, R, K]``.

        Args:
            inputs: The operands of the call.
            rows: Queries, ``[B, H, R, D]``.
            units: Keys or means of blocks, ``[B, H, U, D]``.
            down: W_down, ``[U, K]`` or ``[B, U, K]``.
        """
        q, k = rows, units
        if self.project_q is not None and self.project_k is not None:
            q, k = self.project_q(q), self.project_k(k)
        basis_keys = for_heads(down).to(k.dtype).mT @ k
        return products(q, basis_keys, self._scale(inputs)).softmax(-1).to(q.dtype)

    def _scale(self, inputs: AttentionInputs) -> float:
        return inputs.site.heads**-0.5 if self.strategy.head_scale else inputs.scale

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Kullback-Leibler divergence of the normalised scores from exact attention.

        It is the mean over rows. (The paper uses the squared error, which is insensitive to rows
        without a peak.)
        """
        scores = self.scores(inputs).float()
        shares = scores / scores.sum(-1, keepdim=True).clamp_min(1e-6)
        target = exact_rows(inputs).float()
        return F.kl_div(shares.clamp_min(1e-8).log(), target, reduction="none").sum(-1).mean()

    @torch.no_grad()
    def init_from_batch(self, inputs: AttentionInputs) -> None:
        """Fit the channel maps to one batch; see `fit_channel_maps`."""
        if self.project_q is None or self.project_k is None:
            return
        units, down = self._units(inputs), without_hidden_keys(self._tables(inputs)[0], inputs)
        basis_keys = for_heads(down).to(units.dtype).mT @ units
        maps, scale = (self.project_q, self.project_k), inputs.scale / self._scale(inputs)
        fit_channel_maps(maps, inputs.row_queries, basis_keys, scale)

    def _tables(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """W_down and W_up at this call's resolution, ``[U, K]``.

        If tokens were dropped or merged, the tables of the remaining ones, ``[B, U, K]``.
        """
        grid, blocks = inputs.image_grid, inputs.blocks
        if blocks is not None and grid == inputs.key_grid:
            return self._image_tables(unit_grid(grid, inputs.block, inputs.key_views))
        down, up = (inputs.gather_rows(table) for table in self._image_tables(grid))
        if blocks is None:
            return down, up
        return pooled_by_block(down, blocks, self.prefix, total=True), pooled_by_block(
            up, blocks, self.prefix
        )

    def _image_tables(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The tables for all tokens of an image; resized ones are cached until weights change."""
        if grid == self.grid:
            return self.down, self.up
        return self._resized(self.down, self.up, self.grid, grid, self.prefix)
