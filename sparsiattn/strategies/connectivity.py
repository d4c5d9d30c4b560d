"""Learned connectivity (Sparsifiner, CVPR 2023, arXiv 2303.13755): predicted keys, per image."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.budget import Budget, blocks_within
from sparsiattn.attention.geometry import Grid, Tile, Tiles
from sparsiattn.attention.inputs import AttentionInputs, products
from sparsiattn.attention.pattern import Pattern, Ranked
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.native import scores as native
from sparsiattn.strategies.base import TILE_FROM, Budgets, LearnedPlanner, Strategy, spawn
from sparsiattn.strategies.basis import channel_maps, initial_tables, resize_table

MOST_COLUMNS = 65_536  # of a predictor; more is a slip
MOST_ROWS = 1 << 24  # elements of exact attention that calibration holds at once


@dataclass(frozen=True)
class Connectivity(Strategy):
    """Keys by a predicted score: softmax(Q (W_down K)^T) W_up (Sparsifiner, section 3).

    Useful before any training: W_down starts as average pooling over the token grid and W_up as
    bilinear interpolation back, so the score starts as attention at low resolution.

    reduce: patch tokens per basis vector, so about n / reduce of them; None is 6 as in the paper
    below 1,024 tokens and 16 from there on. basis: the number of basis vectors instead. block: in
    tile mode keys are chosen in blocks of 4 x 4 (2 x 2 below 128 kept keys) and the tables have one
    row per block; 1 for single keys. channels: width to which queries and keys are projected first
    (the authors use half the head dim), None for no projection. basis_threshold: entries of
    abs(W_up) up to this are zero. basis_coef_topk: coefficients kept per query, None for all.
    head_scale: divide logits by the root of the head *count*, as the authors' code does, instead of
    the head dim. salience: multiply scores by what the mean query sees beyond low resolution; ours,
    not in the paper, next to free, and most of what an untrained predictor lacks (docs: What it
    keeps). own: the share of its attention that a query gives to its own key beyond what low
    resolution sees, before calibration; None for the paper's rule. Ours, too: low resolution cannot
    tell the key of the one that asks from others of its cell.

    >>> Connectivity(k=0.1).to_dict()["name"]
    'connectivity'
    """

    name = "connectivity"
    paper = "https://arxiv.org/abs/2303.13755"
    fidelity = (
        "as published with tile=1, background=None, own=None (see load_sparsifiner); tiles,"
        " summary keys and the start without training are this library's"
    )

    k: Budgets = 0.25
    block: Tile | str = field(default="auto", kw_only=True)
    reduce: float | None = None
    basis: int | None = None
    channels: int | None = None
    basis_threshold: float = 0.0
    basis_coef_topk: int | None = None
    head_scale: bool = False
    salience: bool = True
    own: float | None = 0.1
    background: int | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce is not None and not _number_from(self.reduce, 1):
            raise InvalidOption(f"reduce must be None or a number >= 1, got {self.reduce!r}")
        if self.own is not None and not _number_from(self.own, 0):
            raise InvalidOption(f"own must be None or a number >= 0, got {self.own!r}")
        if not _number_from(self.basis_threshold, 0):
            raise InvalidOption(f"basis_threshold must be >= 0, got {self.basis_threshold!r}")
        for name in ("basis", "channels", "basis_coef_topk"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= MOST_COLUMNS):
                raise InvalidOption(
                    f"{name} must be None or an int in 1..{MOST_COLUMNS}, got {value!r}"
                )

    def planner(self, site: Site) -> ConnectivityPlanner:
        return ConnectivityPlanner(self, site)


def _number_from(value: object, least: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and least <= value < 1e18  # type: ignore[operator]  # torch takes 64 bits


class ConnectivityPlanner(LearnedPlanner):
    """The mask predictor of one site; its weights are shared by all heads.

    down, up: ``[U, K]`` for ``U`` units, the keys or key blocks (prefix keys first), and ``K``
    basis vectors. project_q, project_k: ``[c, D]`` channel maps, absent when ``channels`` is None.
    own: ``[1]``, absent when the strategy's is None or queries and keys are not the same tokens.
    """

    def __init__(self, strategy: Connectivity, site: Site) -> None:
        super().__init__()
        self.strategy = strategy
        self.grid = unit_grid(site.key_grid, strategy.block_for(site.keys))
        self.prefix = site.prefix_tokens
        cells = basis_cells(strategy, site.key_grid)
        down, up = initial_tables(self.grid, self.prefix, cells, strategy.basis)
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.own: nn.Parameter | None = None
        if strategy.own is not None and site.key_grid == site.grid and site.keys == site.tokens:
            # one element, not a scalar: FSDP shards no scalars
            self.own = nn.Parameter(torch.tensor([float(strategy.own)]), requires_grad=False)
        self.project_q: nn.Linear | None = None
        self.project_k: nn.Linear | None = None
        if strategy.channels is not None:
            self._add_channel_maps(site, strategy.channels)
        self._resized: tuple[object, Tensor, Tensor] | None = None

    def _add_channel_maps(self, site: Site, channels: int) -> None:
        """The same semi-orthogonal map for q and k: their products are kept as well as c can."""
        generator = spawn(zlib.crc32(site.name.encode()))
        self.project_q, self.project_k = channel_maps(site.head_dim, channels, generator)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_resized": None}

    def forward(self, inputs: AttentionInputs) -> Pattern:
        k: Budget = self.strategy.k  # type: ignore[assignment]
        count, blocks = 0, inputs.blocks
        if blocks is not None:
            count = blocks_within(k, inputs.n_keys, inputs.prefix, blocks)
        compiled = self._compiled(inputs, count)
        if compiled is None:
            return Pattern.top(self.scores(inputs), k)
        scores, best = compiled
        return Ranked(scores.shape[-2], scores.shape[-1], scores, k, best if count else None)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Predicted connectivity, ``[B, H, R, n]``: one row per patch query or tile, one column
        per key, or per block of patch keys."""
        compiled = self._compiled(inputs, 0)
        if compiled is not None:
            return compiled[0]
        blocks, down, up = inputs.blocks, *self._tables(inputs)
        units = inputs.k if blocks is None else _pooled(inputs.k, blocks, self.prefix)
        rows, down = inputs.row_queries, _of_seen(down, inputs)
        coefficients = self._keep_top(self.coefficients(inputs, rows, units, down))
        basis = up if blocks is None else up[..., self.prefix :, :]
        scores = coefficients @ _for_heads(self._basis(basis)).mT.to(coefficients.dtype)
        if self.strategy.salience:
            scores = scores.float() * self._salience(inputs, units, down, up)
        same = inputs.n_queries == inputs.n_keys
        return self._add_own(scores, inputs) if self.own is not None and same else scores

    def _compiled(self, inputs: AttentionInputs, count: int) -> tuple[Tensor, Tensor] | None:
        """Scores of blocks and the places of the ``count`` best from compiled code, where there is
        some that knows this call: no option beside `own` and `salience`, no mask, no token dropped
        or merged, no gradient."""
        tiles, blocks, strategy = inputs.tiles, inputs.blocks, self.strategy
        if tiles is None or blocks is None or inputs.bias is not None or self.project_q is not None:
            return None
        (down, up), top = self._tables(inputs), strategy.basis_coef_topk
        own = self.own if inputs.n_queries == inputs.n_keys else None
        if down.dim() != 2 or (top is not None and top < down.shape[-1]):
            return None
        if not native.serves(inputs.q, inputs.k, down, up, *(() if own is None else (own,))):
            return None
        shares = None if own is None else self._own_shares(inputs, inputs.block)
        return native.block_scores(
            inputs.q, inputs.k, tiles, blocks, (down, up), own, shares, self.prefix,
            (inputs.scale, self._scale(inputs)), strategy.basis_threshold, strategy.salience, count,
        )  # fmt: skip

    def _own_shares(self, inputs: AttentionInputs, block: Tile) -> Tensor:
        """The share of each tile's queries that each key or block is, ``[T, U]``."""
        return geometry.table(
            geometry.own_shares, inputs.query_grid, inputs.tile, block, device=inputs.q.device
        )

    def _add_own(self, scores: Tensor, inputs: AttentionInputs) -> Tensor:
        """A share of every row's score more for the row's own key; of a tile, for its queries'."""
        assert self.own is not None
        extra = self.own.to(scores.dtype) * scores.sum(-1, keepdim=True)
        if inputs.tiles is None:
            if torch.compiler.is_compiling():  # ONNX has no view to write through
                shape = scores.shape[-2:]
                here = geometry.table(own_keys, *shape, self.prefix, device=scores.device)
                return torch.addcmul(scores, extra, here.to(scores.dtype))
            scores.diagonal(self.prefix, -2, -1).add_(extra.squeeze(-1))
            return scores
        block = 1 if inputs.blocks is None else inputs.block
        shares = self._own_shares(inputs, block).to(scores.dtype)
        return torch.addcmul(scores, extra, F.pad(shares, (scores.shape[-1] - shares.shape[1], 0)))

    def _salience(self, inputs: AttentionInputs, units: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """How much more the mean patch query sees of each key than low resolution says, ``[B, H, 1,
        n]``, or of each block: which keys of a cell stand out, whoever asks."""
        mean = inputs.mean_query * inputs.scale
        seen = mean @ units.mT
        down, up = (_for_heads(table).to(seen.dtype) for table in (down, up))
        low, blocks = (seen @ down @ up.mT).float(), inputs.blocks
        if blocks is None:
            return _bounded_exp(seen.float() - low)
        logits = (mean @ inputs.k[..., self.prefix :, :].mT).float()
        above = blocks.gather(logits.mT).squeeze(-1) - low[..., self.prefix :].mT
        return blocks.weigh(_bounded_exp(above)).unsqueeze(-2)

    def coefficients(
        self, inputs: AttentionInputs, rows: Tensor, units: Tensor, down: Tensor
    ) -> Tensor:
        """Softmax over the basis of every row, ``[B, H, R, K]``."""
        q, k = rows, units
        if self.project_q is not None and self.project_k is not None:
            q, k = self.project_q(q), self.project_k(k)
        reduced = _for_heads(down).to(k.dtype).mT @ k
        return products(q, reduced, self._scale(inputs)).softmax(-1).to(q.dtype)

    def _scale(self, inputs: AttentionInputs) -> float:
        return inputs.site.heads**-0.5 if self.strategy.head_scale else inputs.scale

    def _keep_top(self, coefficients: Tensor) -> Tensor:
        top = self.strategy.basis_coef_topk
        if top is None or top >= coefficients.shape[-1]:
            return coefficients
        kept = coefficients.topk(top, dim=-1)
        return torch.zeros_like(coefficients).scatter(-1, kept.indices, kept.values)

    def _basis(self, up: Tensor) -> Tensor:
        """abs(W_up) without its small entries (the authors' inference rule)."""
        size = up.abs()
        if not self.strategy.basis_threshold:
            return size
        return torch.where(size > self.strategy.basis_threshold, size, 0.0)

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Kullback-Leibler divergence of the scores, scaled to sum to one, from the rows of the
        exact attention; mean over rows. (The paper's is the squared error, which says little of
        rows without a peak.)"""
        scores = self.scores(inputs).float()
        shares = scores / scores.sum(-1, keepdim=True).clamp_min(1e-6)
        target = self._target(inputs).float()
        return F.kl_div(shares.clamp_min(1e-8).log(), target, reduction="none").sum(-1).mean()

    @torch.no_grad()
    def init_from_batch(self, inputs: AttentionInputs) -> None:
        """Channel maps whose products are the best of their rank to the whole ones, in the mean
        over queries and basis keys: from the singular vectors of ``Cq^(1/2) Ck^(1/2)`` for second
        moments ``Cq`` and ``Ck``. Keys count from their mean, which softmax does not see."""
        if self.project_q is None or self.project_k is None:
            return
        blocks, down = inputs.blocks, _of_seen(self._tables(inputs)[0], inputs)
        units = inputs.k if blocks is None else _pooled(inputs.k, blocks, self.prefix)
        keys = _for_heads(down).to(units.dtype).mT @ units
        roots = [_root(x) for x in (inputs.row_queries, keys - keys.mean(-2, keepdim=True))]
        u, s, vh = torch.linalg.svd(roots[0][0] @ roots[1][0])
        scale = inputs.scale / self._scale(inputs)
        for linear, inverse, side, gain in (
            (self.project_q, roots[0][1], u, scale), (self.project_k, roots[1][1], vh.mT, 1.0),
        ):  # fmt: skip
            rank = linear.out_features
            best = (inverse @ side[:, :rank] * s[:rank].sqrt()).mT * gain
            linear.weight.copy_(F.pad(best, (0, 0, 0, rank - len(best))))
            linear.bias.zero_()

    @torch.no_grad()
    def _target(self, inputs: AttentionInputs) -> Tensor:
        """The exact attention of every row, ``[B, H, R, n]``, or its share in every block; from a
        few rows at a time, so that no ``N x N`` tensor is made where tiles share their keys."""
        tiles = inputs.tiles
        if tiles is None:
            alone = torch.arange(inputs.n_queries - inputs.prefix, device=inputs.q.device)
            rows, weight = alone.unsqueeze(-1), torch.ones_like(alone.unsqueeze(-1))
        else:
            rows, weight = tiles.order, tiles.weight
        per_row = inputs.q.shape[:-2].numel() * rows.shape[1] * inputs.n_keys
        at_once = max(1, MOST_ROWS // per_row)
        parts = zip(rows.split(at_once), weight.split(at_once), strict=True)
        return torch.cat([self._target_part(inputs, *part) for part in parts], dim=-2)

    def _target_part(self, inputs: AttentionInputs, rows: Tensor, weight: Tensor) -> Tensor:
        exact = inputs.logits(rows.flatten() + inputs.prefix).softmax(-1).nan_to_num(0.0)
        share = weight.to(exact.dtype).unsqueeze(-1)
        target: Tensor = (exact.unflatten(-2, rows.shape) * share).sum(-2)
        if inputs.blocks is None:
            return target
        shares = inputs.blocks.mean(target[..., self.prefix :].mT).mT
        return shares / shares.sum(-1, keepdim=True).clamp_min(1e-6)

    def _tables(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """W_down and W_up at this call's resolution, ``[U, K]``; where tokens were dropped or
        merged, those of the ones that are left, ``[B, U, K]``."""
        grid, blocks = inputs.image_grid, inputs.blocks
        if blocks is not None and grid == inputs.key_grid:
            return self._whole_tables(unit_grid(grid, inputs.block))
        down, up = (inputs.gather_rows(table) for table in self._whole_tables(grid))
        if blocks is None:
            return down, up
        return (
            _pooled(down, blocks, self.prefix, total=True),
            _pooled(up, blocks, self.prefix),
        )

    def _whole_tables(self, grid: Grid) -> tuple[Tensor, Tensor]:
        if grid == self.grid:
            return self.down, self.up
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._resize(grid)
        key = (grid, *(_identity(table) for table in (self.down, self.up)))
        cached = self._resized
        if cached is None or cached[0] != key:
            with torch.inference_mode(False):
                down, up = self._resize(grid)
                cached = (key, down.detach(), up.detach())
            self._resized = cached
        return cached[1], cached[2]

    def _resize(self, grid: Grid) -> tuple[Tensor, Tensor]:
        ratio = self.grid[0] * self.grid[1] / (grid[0] * grid[1])
        down = resize_table(self.down, self.grid, grid, self.prefix)
        # pooling weights sum to one over more (or fewer) tokens
        patches = torch.arange(down.shape[0], device=down.device)[:, None] >= self.prefix
        return torch.where(patches, down * ratio, down), resize_table(
            self.up, self.grid, grid, self.prefix
        )


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Root of the second moment of rows ``[..., D]`` and its inverse, ``[D, D]`` float64."""
    rows = x.flatten(0, -2).double()
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    roots = values.clamp_min(values[-1] * 1e-6 + 1e-12).sqrt()
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT


def _bounded_exp(x: Tensor) -> Tensor:
    """In single precision and bounded: half precision ends at e^11."""
    return x.clamp_max(30.0).exp()


def _pooled(x: Tensor, blocks: Tiles, prefix: int, *, total: bool = False) -> Tensor:
    """Prefix rows as they are, then one row per block: the mean (or the sum) of its tokens'."""
    rows = blocks.mean(x[..., prefix:, :])
    if total:
        sizes = (blocks.weight > 0).sum(-1, keepdim=True)
        rows = rows * sizes.to(rows.dtype)
    return torch.cat([x[..., :prefix, :], rows], dim=-2) if prefix else rows


def unit_grid(grid: Grid, block: Tile) -> Grid:
    """The grid of what is chosen at once: patch keys, or blocks of them."""
    return grid if isinstance(block, int) else geometry.tile_parts(grid, block)


def own_keys(rows: int, keys: int, prefix: int, *, device: torch.device) -> Tensor:
    """``[rows, keys]``: one where a row's query is that key, after the prefix's columns.

    >>> own_keys(2, 3, 1, device=torch.device("cpu")).int().tolist()
    [[0, 1, 0], [0, 0, 1]]
    """
    places = torch.arange(keys, device=device) - prefix
    return places == torch.arange(rows, device=device)[:, None]


def _for_heads(table: Tensor) -> Tensor:
    """``[B, Nk, K]`` with an axis for heads, others as they are."""
    return table.unsqueeze(1) if table.dim() == 3 else table


def _of_seen(down: Tensor, inputs: AttentionInputs) -> Tensor:
    """W_down without keys that no query sees (padding), the others making up for them."""
    seen = inputs.visible_keys
    if seen is None:
        return down
    whole = _for_heads(down)
    part = whole * seen.unsqueeze(-1)
    lost = whole.abs().sum(-2, keepdim=True) / part.abs().sum(-2, keepdim=True).clamp_min(1e-6)
    return part * lost


def _identity(table: Tensor) -> tuple[object, ...]:
    version = 0 if table.is_inference() else table._version
    return table.data_ptr(), version, table.dtype, table.device


def basis_cells(strategy: Connectivity, grid: Grid) -> Grid:
    """The cells whose means are the initial basis: about one for every ``reduce`` tokens, at most
    ``basis`` of them where that is given."""
    exact = strategy.basis is not None
    n = grid[0] * grid[1]
    reduce = strategy.reduce or (6.0 if n < TILE_FROM else 16.0)
    if strategy.basis:
        reduce = max(1.0, n / strategy.basis)
    side = math.sqrt(reduce)
    sizes = (1.0, grid[1] / reduce) if grid[0] == 1 else (grid[0] / side, grid[1] / side)
    rows, columns = (max(1, math.floor(s) if exact else math.ceil(s)) for s in sizes)
    return rows, columns
