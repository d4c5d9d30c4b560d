"""Learned connectivity (Sparsifiner, CVPR 2023, arXiv 2303.13755): a low-rank predictor says, per
image, which keys matter to each query; attention runs only there."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import geometry
from sparsiattn.errors import InvalidOption
from sparsiattn.geometry import Grid
from sparsiattn.patterns import Pattern
from sparsiattn.site import AttentionInputs, Site
from sparsiattn.strategy import TILE_FROM, Budgets, LearnedPlanner, Strategy, spawn


@dataclass(frozen=True)
class Connectivity(Strategy):
    """Keys by a predicted score: softmax(Q (W_down K)^T) W_up (Sparsifiner, section 3).

    Useful before any training: W_down starts as average pooling over the token grid and W_up as
    bilinear interpolation back, so the score starts as attention at low resolution.

    reduce: patch tokens per basis vector, so about n / reduce of them; None is 6 as in the paper
    below 1,024 tokens and 16 from there on. basis: their exact number instead. channels: width to
    which queries and keys are projected first (the authors use half the head dim), None for no
    projection. basis_threshold: entries of abs(W_up) up to this are zero. basis_coef_topk:
    coefficients kept per query, None for all. head_scale: divide logits by the root of the head
    *count*, as the authors' code does, instead of the head dim. salience: multiply scores by what
    the mean query sees beyond low resolution; ours, not in the paper, next to free, and most of
    what an untrained predictor lacks (docs: What it keeps).

    >>> Connectivity(k=0.1).to_dict()["name"]
    'connectivity'
    """

    name = "connectivity"

    k: Budgets = 0.25
    reduce: float | None = None
    basis: int | None = None
    channels: int | None = None
    basis_threshold: float = 0.0
    basis_coef_topk: int | None = None
    head_scale: bool = False
    salience: bool = True
    background: int | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce is not None and not _number_from(self.reduce, 1):
            raise InvalidOption(f"reduce must be None or a number >= 1, got {self.reduce!r}")
        if not _number_from(self.basis_threshold, 0):
            raise InvalidOption(f"basis_threshold must be >= 0, got {self.basis_threshold!r}")
        for name in ("basis", "channels", "basis_coef_topk"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidOption(f"{name} must be None or an int >= 1, got {value!r}")

    def planner(self, site: Site) -> ConnectivityPlanner:
        return ConnectivityPlanner(self, site)


def _number_from(value: object, least: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least


class ConnectivityPlanner(LearnedPlanner):
    """The mask predictor of one site; its weights are shared by all heads.

    down, up: ``[Nk, K]`` for ``Nk`` keys (prefix first) and ``K`` basis vectors. project_q,
    project_k: ``[c, D]`` channel maps, absent when ``channels`` is None.
    """

    def __init__(self, strategy: Connectivity, site: Site) -> None:
        super().__init__()
        self.strategy = strategy
        self.grid, self.prefix = site.key_grid, site.prefix_tokens
        down, up = _initial_tables(site, basis_cells(strategy, site.key_grid), strategy.basis)
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.project_q: nn.Linear | None = None
        self.project_k: nn.Linear | None = None
        if strategy.channels is not None:
            self._add_channel_maps(site, strategy.channels)
        self._resized: tuple[object, Tensor, Tensor] | None = None

    def _add_channel_maps(self, site: Site, channels: int) -> None:
        """The same semi-orthogonal map for q and k: their products are kept as well as c can."""
        weight = torch.empty(channels, site.head_dim)
        nn.init.orthogonal_(weight, generator=spawn(zlib.crc32(site.name.encode())))
        gain = max(1.0, math.sqrt(site.head_dim / channels))
        for name in ("project_q", "project_k"):
            linear = nn.utils.skip_init(nn.Linear, site.head_dim, channels)
            linear.weight = nn.Parameter(weight * math.sqrt(gain), requires_grad=False)
            linear.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
            setattr(self, name, linear)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_resized": None}

    def forward(self, inputs: AttentionInputs) -> Pattern:
        return Pattern.top(self.scores(inputs), self.strategy.k)  # type: ignore[arg-type]

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Predicted connectivity, ``[B, H, R, Nk]``, one row per patch query or tile."""
        down, up = self._tables(inputs)
        coefficients = self._keep_top(self.coefficients(inputs, down))
        scores = coefficients @ _for_heads(self._basis(up)).mT.to(coefficients.dtype)
        if not self.strategy.salience:
            return scores
        # exponents in single precision and bounded: half precision ends at e^11
        return scores.float() * self._salience(inputs, down, up).float().clamp_max(30.0).exp()

    def _salience(self, inputs: AttentionInputs, down: Tensor, up: Tensor) -> Tensor:
        """Logits of the mean patch query minus their low-resolution part, ``[B, H, 1, Nk]``: which
        keys of a cell stand out, whoever asks."""
        mean = inputs.patch_queries.mean(-2, keepdim=True)
        logits = mean @ inputs.k.mT * inputs.scale
        down, up = (_for_heads(table).to(logits.dtype) for table in (down, up))
        return logits - logits @ down @ up.mT

    def coefficients(self, inputs: AttentionInputs, down: Tensor) -> Tensor:
        """Softmax over the basis of every row, ``[B, H, R, K]``."""
        q, k = inputs.row_queries, inputs.k
        if self.project_q is not None and self.project_k is not None:
            q, k = self.project_q(q), self.project_k(k)
        reduced = _for_heads(down).to(k.dtype).mT @ k
        scale = inputs.site.heads**-0.5 if self.strategy.head_scale else inputs.scale
        return (q @ reduced.mT * scale).softmax(-1)

    def _keep_top(self, coefficients: Tensor) -> Tensor:
        top = self.strategy.basis_coef_topk
        if top is None or top >= coefficients.shape[-1]:
            return coefficients
        kept = coefficients.topk(top, dim=-1)
        return torch.zeros_like(coefficients).scatter(-1, kept.indices, kept.values)

    def _basis(self, up: Tensor) -> Tensor:
        """abs(W_up) without its small entries (the authors' inference rule)."""
        size = up.abs()
        return torch.where(size > self.strategy.basis_threshold, size, 0.0)

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Squared error between scores, scaled to sum to one, and the rows of the exact attention;
        summed over keys, averaged over rows (after the paper's reconstruction loss)."""
        exact = inputs.logits().softmax(-1).nan_to_num(0.0)[..., inputs.prefix :, :]
        tiles = inputs.tiles
        target = exact if tiles is None else tiles.mean(exact)
        scores = self.scores(inputs)
        shares = scores / scores.sum(-1, keepdim=True).clamp_min(1e-6)
        return (shares - target.detach()).square().sum(-1).mean()

    def _tables(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """W_down and W_up at this call's resolution, ``[Nk, K]``; where tokens were dropped or
        merged, those of the ones that are left, ``[B, Nk, K]``."""
        down, up = self._whole_tables(inputs.whole_grid)
        return inputs.follow(down), inputs.follow(up)

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


def _for_heads(table: Tensor) -> Tensor:
    """``[Nk, K]`` as it is, ``[B, Nk, K]`` with an axis for heads."""
    return table if table.dim() == 2 else table.unsqueeze(1)


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


def _initial_tables(site: Site, cells: Grid, basis: int | None) -> tuple[Tensor, Tensor]:
    """Average pooling and bilinear interpolation, ``[P + n, K]``; prefix rows are zero."""
    cpu = torch.device("cpu")
    tables = []
    for build in (geometry.pooling, geometry.interpolation):
        table = build(site.key_grid, cells, device=cpu)
        if basis is not None:
            table = F.pad(table, (0, max(0, basis - table.shape[1])))[:, :basis]
        tables.append(F.pad(table, (0, 0, site.prefix_tokens, 0)).contiguous())
    return tables[0], tables[1]


def resize_table(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """Bilinear interpolation of the patch rows of ``[P + n, K]`` to another grid; prefix rows
    stay as they are."""
    image = table[prefix:].mT.reshape(1, -1, *old)
    resized = F.interpolate(image.float(), new, mode="bilinear", align_corners=False)
    return torch.cat([table[:prefix], resized[0].flatten(1).mT.to(table.dtype)])
