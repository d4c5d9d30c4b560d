"""`Strategy`, the contract of a strategy: an immutable config that plans, or makes a planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from sparsiattn.attention.auto_options import auto_background, auto_block, auto_options
from sparsiattn.attention.budget import Budget, at_most, check_budget, count_of
from sparsiattn.attention.geometry import Grid, Sides, Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_order import alternated, depth_of
from sparsiattn.errors import InvalidOption, InvalidType, RenamedMembers
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.planner_weights import PlannerWeights

Budgets = Budget | Sequence[Budget] | Callable[[Site], Budget]


@runtime_checkable
class Planner(Protocol):
    """The planner of one site: a callable that takes `AttentionInputs` and returns a `Pattern`.

    If it has a method ``after(inputs, output)``, this is called after attention with the result of
    the site, ``[B, H, Nq, Dv]``. It may have the attribute ``plans_by_shape``, see `Strategy`.

    >>> x = torch.randn(1, 2, 16, 8)
    >>> def first_keys(inputs: AttentionInputs) -> Pattern:
    ...     first = torch.arange(inputs.n_keys) < 4
    ...     return Pattern.mask(first.expand(1, 1, inputs.n_queries, -1))
    >>> inputs = AttentionInputs(x, x, x, 1.0, None, Site.of(x, x, x))
    >>> first_keys(inputs).to_mask().shape
    torch.Size([1, 1, 16, 16])
    """

    def __call__(self, inputs: AttentionInputs, /) -> Pattern: ...


@dataclass(frozen=True)
class Strategy(Config):
    """Decides which keys to keep. Subclass it as a frozen dataclass and set ``name``.

    Override `plan` if planning needs only the inputs of a call, or `planner` if it needs state per
    site (weights, tables). The core takes care of budgets, prefix tokens, shared key heads, tiles
    and background.

    Args:
        tile: Queries that share one key list: 1, ``(rows, columns)`` of patches, or ``"auto"``: 1
            below 1,024 tokens, ``(8, 4)`` below 2,304, else ``(8, 8)``. In videos also ``(frames,
            rows, columns)``; a tile spans at most that many frames, as many as divide their number.
        block: Patch keys that are kept or dropped together if there are tiles: 1,
            ``(rows, columns)``, or ``"auto"`` for larger blocks with larger budgets. If the host's
            mask forbids keys, keys are chosen one by one. With a tile of frames it is ``(frames,
            rows, columns)`` with as many frames; ``"auto"`` blocks span those frames, too.
        background: Pool dropped keys into g x g summary keys; ``"auto"`` for a g that suits the
            token grid (5 at 14 x 14, 10 at 37 x 37); None for no summary keys.
        prefix_keys: Whether CLS and register keys are always kept, within the budget.
        max_keys: Number of keys that a query keeps at most, however long the sequence of a call is;
            None for no limit beside ``k``.

    Attributes:
        selects_keys: Whether patterns select among the host's keys. Those of
            `Pattern.computed_keys`, `Pattern.logits` and `Pattern.output` do not, and cannot be
            combined with ``background``.
        uses_cross_layer_state: Whether planners use `AttentionInputs.store` and `load`.
        needs_grid: Whether the strategy needs to know the positions of tokens in the image.
        supports_views: Whether a strategy with ``needs_grid`` supports sequences of several images
            with special tokens between them; without it, such sequences are refused.
        supports_frames: Whether tiles can span several frames of a video. `AttentionInputs.order`
            tells how the rows of frames alternate in the grids then.
        plans_by_shape: Whether patterns depend on shapes and options only (for example because the
            kernel finds the keys), so that one plan serves all calls of the same shape. A subclass
            that overrides ``plan`` must set it again.

    >>> from dataclasses import dataclass
    >>> from sparsiattn import Pattern, Strategy
    >>> @dataclass(frozen=True)
    ... class Nearest(Strategy):
    ...     name = "nearest"
    ...     k: float = 0.1
    ...     def plan(self, inputs):
    ...         return Pattern.top(inputs.q @ inputs.k.mT, self.k)
    >>> Nearest(k=0.2).to_dict()["options"]["k"]
    0.2
    """

    renamed_members: ClassVar[Mapping[str, str]] = {
        **Config.renamed_members,
        "at": "resolve_for",
        "carries": "uses_cross_layer_state",
        "chooses": "selects_keys",
    }

    kind = "attention"
    selects_keys: ClassVar[bool] = True
    uses_cross_layer_state: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    supports_views: ClassVar[bool] = False
    supports_frames: ClassVar[bool] = False
    plans_by_shape: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plan" in vars(cls) and "plans_by_shape" not in vars(cls):
            cls.plans_by_shape = False

    tile: int | Sides | str = field(default="auto", kw_only=True)
    block: int | Sides | str = field(default=1, kw_only=True)
    background: int | str | None = field(default=None, kw_only=True)
    prefix_keys: bool = field(default=True, kw_only=True)
    max_keys: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("tile", "block"):
            object.__setattr__(self, name, _check_tile(getattr(self, name), name))
        self._check_frames()
        _check_background(self.background)
        if self.background is not None and not self.selects_keys:
            raise InvalidOption(
                f"background must be None for {self.name!r}, which drops no keys that summary keys "
                f"could stand for; got {self.background!r}"
            )
        check_flag("prefix_keys", self.prefix_keys)
        self._check_max_keys()
        k = getattr(self, "k", None)
        if "k" in self.option_names() and not (isinstance(k, (list, tuple)) or callable(k)):
            check_budget(k)

    def _check_frames(self) -> None:
        """Raise `InvalidOption` if tile or block cannot span so many frames."""
        tile, block = (
            sides[0] if isinstance(sides, tuple) and len(sides) == 3 else 1
            for sides in (self.tile, self.block)
        )
        if max(tile, block) > 1 and not self.supports_frames:
            raise InvalidOption(
                f"tiles of {self.name!r} cannot span several frames, got tile={self.tile!r} and "
                f"block={self.block!r}: use (rows, columns)"
            )
        groups = self.tile != 1 and isinstance(self.block, tuple) and math.prod(self.block) > 1
        if groups and tile != block:
            raise InvalidOption(
                "block must span as many frames as tile, or be 1 or 'auto': got "
                f"tile={self.tile!r} and block={self.block!r}"
            )

    def plan(self, inputs: AttentionInputs) -> Pattern:
        """The pattern for one call; for strategies without state."""
        raise NotImplementedError(
            f"{type(self).__name__} must override plan(inputs), or planner(site) if it learns"
        )

    def planner(self, site: Site) -> Planner:
        """Make the planner of a site; an `nn.Module` if it has weights (see `LearnedPlanner`)."""
        return Stateless(self)

    def _check_max_keys(self) -> None:
        most = self.max_keys
        if most is None:
            return
        if type(most) is not int or most < 1:
            raise InvalidOption(f"max_keys must be None or an int >= 1, got {most!r}")
        if "k" not in self.option_names():
            raise InvalidOption(
                f"max_keys limits the budget k, but {self.name!r} has no option k; got {most!r}"
            )

    def budget_for(self, n_keys: int) -> Budget:
        """The budget of a call with ``n_keys`` keys: ``k``, or ``max_keys`` if that is less.

        Only for a config with a single budget, as `resolve_for` returns it.
        """
        return at_most(self.k, n_keys, self.max_keys)  # type: ignore[attr-defined]

    def _count(self, n_keys: int) -> int | None:
        """Number of keys kept out of ``n_keys``; None without a budget or before it is resolved."""
        is_single = isinstance(getattr(self, "k", None), (int, float))
        return count_of(self.budget_for(n_keys), n_keys) if is_single else None

    def keeps_all(self, n_keys: int) -> bool:
        """Whether the budget covers every key, so that the host's own attention runs."""
        return self._count(n_keys) == n_keys

    def tile_sides(self, tokens: int) -> int | Sides:
        """The tile for this number of tokens, with ``"auto"`` resolved; it may have three sides."""
        if self.tile == "auto":
            return auto_options(tokens).tile
        assert not isinstance(self.tile, str)
        return 1 if self.tile in ((1, 1), (1, 1, 1)) else self.tile

    def depth_for(self, views: int) -> int:
        """Number of frames that a tile spans, if there are that many; see `TokenOrder`."""
        return depth_of(1 if isinstance(self.tile, str) else self.tile, views)

    def tile_for(self, tokens: int, views: int = 1) -> Tile:
        """Rows and columns of a tile, with ``"auto"`` and ``(1, 1)`` resolved to a tile and to 1.

        Args:
            tokens: Number of queries, prefix included.
            views: Number of frames. If a tile spans several, it has the rows of all of them.
        """
        tile = alternated(self.tile_sides(tokens), self.depth_for(views))
        return 1 if tile == (1, 1) else tile

    def block_for(self, keys: int, tile: Tile | None = None, views: int = 1) -> Tile:
        """The block for this number of keys, with ``"auto"`` resolved.

        It is 1 without tiles, and if prefix keys have to compete with patch keys.

        Args:
            keys: Number of keys, prefix included.
            tile: Queries that share their keys; None for the tile that an image of this many tokens
                gets.
            views: As in `tile_for`.
        """
        tile = self.tile_for(keys, views) if tile is None else tile
        if tile == 1 or not self.prefix_keys or self.block in (1, (1, 1), (1, 1, 1)):
            return 1
        assert self.block == "auto" or not isinstance(self.block, str)
        sides = auto_block(self._count(keys) or 0) if isinstance(self.block, str) else self.block
        return alternated(sides, self.depth_for(views))

    def background_for(self, grid: Grid, views: int = 1) -> int | None:
        """The g of g x g summary keys for a grid of patch tokens, with ``"auto"`` resolved.

        Args:
            grid: Rows and columns, of all views stacked vertically.
            views: Number of images or frames in the grid; each has g x g summary keys.
        """
        if isinstance(self.background, str):
            return auto_background(grid, views)
        return self.background

    def resolve_sites(self, sites: Sequence[Site]) -> list[Strategy]:
        """The config of every patched site; by default each from `resolve_for`.

        Override it where a site's config depends on the other sites.
        """
        return [self.resolve_for(site, i, len(sites)) for i, site in enumerate(sites)]

    def resolve_for(self, site: Site, position: int, count: int) -> Strategy:
        """This config with a single budget instead of a list or a function of budgets.

        Args:
            site: The site to plan for.
            position: Index of the site among the patched sites.
            count: Number of patched sites.

        Raises:
            InvalidOption: The number of budgets in a list is not ``count``.
        """
        k = getattr(self, "k", None)
        if k is None or isinstance(k, (int, float)):
            return self
        if callable(k):
            return replace(self, k=check_budget(k(site)))  # type: ignore[call-arg]
        if len(k) != count:
            raise InvalidOption(
                f"k as a list needs one budget per patched site: {count}, got {len(k)}; "
                "narrow sites= or pass a function of the site"
            )
        return replace(self, k=check_budget(k[position]))  # type: ignore[call-arg]


@dataclass(frozen=True)
class Stateless:
    """A planner without state, which calls the strategy's `plan`."""

    strategy: Strategy

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return self.strategy.plan(inputs)

    @property
    def plans_by_shape(self) -> bool:
        """Whether plans depend on shapes and options only; see `Strategy`."""
        return self.strategy.plans_by_shape


class LearnedPlanner(RenamedMembers, PlannerWeights):
    """Base of planners with weights, which are named ``<site>.sparsiattn.*`` in the model.

    Override ``forward(inputs)``, which takes `AttentionInputs` and returns a `Pattern`.

    A checkpoint of the dense model still loads strictly: planner weights that it lacks keep their
    values. ``reset_parameters()`` makes the planner again with its original arguments, so initial
    weights must come from a private generator. The weights are frozen at first: a hard choice of
    keys gives them no gradient, and an optimiser or DDP that expects one would fail. `calibrate`
    unfreezes them while it fits.

    Attributes:
        differentiable: Whether gradients of the model's loss reach the weights (patterns that do
            not select keys), so that `train` can fit them without the reconstruction loss.
        renamed_weights: Old names of weights to new ones; state dicts with old names still load.

    >>> class Mixed(LearnedPlanner):
    ...     def __init__(self, heads):
    ...         super().__init__()
    ...         self.gain = torch.nn.Parameter(torch.ones(heads, 1, 1))
    ...     def forward(self, inputs):
    ...         return Pattern.top(self.gain * (inputs.q @ inputs.k.mT), 4)
    >>> x = torch.randn(1, 2, 16, 8)
    >>> site = Site.of(x, x, x)
    >>> Mixed(heads=2)(AttentionInputs(x, x, x, 1.0, None, site)).to_mask().sum().item()
    128
    """

    renamed_members: ClassVar[Mapping[str, str]] = {"start": "init_from_batch"}

    differentiable: ClassVar[bool] = False
    renamed_weights: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(rename_weights)  # type: ignore[no-untyped-call]

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Distance of the planner's scores from the exact attention of these inputs, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not define a calibration loss")

    def unfitted_plan(self, inputs: AttentionInputs) -> Pattern | None:
        """The pattern used before the planner is fitted; None if it is the planner's own.

        If the pattern of fitted weights is no better than this one, `calibrate` resets the weights.
        """
        return None

    def note_weights(self) -> None:
        """Called before a meta copy plans in place of this planner, for example for a report.

        Override it to store as attributes what planning derives from the values of weights.
        """

    def init_from_batch(self, inputs: AttentionInputs) -> None:
        """Initialise weights in closed form from a first batch. Does nothing by default.

        `calibrate` keeps the result only if it lowers the loss.
        """


def rename_weights(module: LearnedPlanner, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook that runs before a state dict is loaded: rename weights with old names."""
    for old, new in module.renamed_weights.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)


def _check_tile(tile: object, name: str) -> int | Sides | str:
    if tile == "auto" or (tile == 1 and not isinstance(tile, bool)):
        return tile
    sides = tuple(tile) if isinstance(tile, (tuple, list)) else ()
    if len(sides) in (2, 3) and all(type(s) is int and s >= 1 for s in sides):
        return sides
    raise InvalidOption(
        f"{name} must be 1, (rows, columns) or (frames, rows, columns) of patches, each >= 1, or "
        f"'auto'; got {tile!r}"
    )


def _check_background(g: object) -> None:
    if g is not None and g != "auto" and (type(g) is not int or g < 1):
        raise InvalidOption(
            f"background must be None, 'auto' or an int g >= 1 for g x g summary keys, got {g!r}"
        )


def check_flag(name: str, value: object) -> None:
    """Raise `InvalidType` unless the option ``name`` is a bool."""
    if not isinstance(value, bool):
        raise InvalidType(f"{name} must be True or False, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def spawn(seed: int) -> torch.Generator:
    """A private generator, so that planners are initialised without the global random state."""
    return torch.Generator().manual_seed(seed)
