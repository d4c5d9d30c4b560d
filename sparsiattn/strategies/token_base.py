"""`TokenStrategy`, the contract of a token strategy: which tokens later blocks carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import unsigned
from sparsiattn.errors import InvalidOption
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.planner_weights import PlannerWeights
from sparsiattn.strategies.reduction import Reduction

RESTORE = ("auto", "unfold", "scatter", None)
Place = Literal["entry", "middle", "exit"]


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """The inputs of a token strategy at one reduction.

    Attributes:
        x: The patch tokens, without the prefix, ``[B, n, C]``.
        site: The site of this block's attention.
        attention: The `AttentionInputs` of this block (prefix included); None if the strategy
            reduces at the block's entry or does not read them.
        layer: Index of the block.
        depth: Number of blocks.
        class_tokens: How many of the prefix tokens are CLS or distillation tokens.
        size: Number of patches merged into each token so far, ``[B, n]``; None if all are 1.
        policy: ``[B, n]``, see `Reduction.weigh`.
        training: Whether the model is in training mode.
        grid: Rows and columns of all patches.
        ids: The patch that each token stands for; see `positions`.
        ahead: Number of rows before ``x`` in memory: leading special tokens.

    >>> q = torch.zeros(1, 2, 16, 4)
    >>> tokens = TokenInputs(torch.zeros(1, 16, 8), Site.of(q, q, q), None, layer=3, depth=12)
    >>> tokens.count, tokens.positions().shape
    (16, torch.Size([1, 16]))
    """

    x: Tensor
    site: Site
    attention: AttentionInputs | None
    layer: int
    depth: int
    class_tokens: int = 0
    size: Tensor | None = None
    policy: Tensor | None = None
    training: bool = False
    grid: Grid = (0, 0)
    ids: Tensor | None = None
    ahead: int = 0

    @property
    def count(self) -> int:
        """Number of patch tokens per image."""
        return self.x.shape[1]

    def positions(self) -> Tensor:
        """The raster index on ``grid`` of the patch whose position each token has.

        Returns:
            ``[B, n]``, or ``[1, n]`` before the first reduction.
        """
        if self.ids is None:
            return torch.arange(self.count, device=self.x.device)[None]
        return unsigned(self.ids)

    def class_attention(self) -> Tensor:
        """Attention of the class tokens to every patch, ``[B, n]``, mean over heads (EViT, 3.1).

        Only these rows are computed, so the host's attention can stay fused.

        Raises:
            InvalidOption: The block's attention is not available here.
        """
        inputs = self._need("class attention")
        rows = inputs.q[..., : self.class_tokens, :]
        bias = inputs.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., : self.class_tokens, :]
        return self._attention(rows, bias)

    def mean_attention(self) -> Tensor:
        """Attention of the mean patch query to every patch, ``[B, n]``, mean over heads.

        Raises:
            InvalidOption: The block's attention is not available here.
        """
        inputs = self._need("attention of the mean query")
        bias = inputs.bias
        if bias is not None and bias.dtype != torch.bool:
            bias = bias[..., inputs.prefix if bias.shape[-2] > 1 else 0 :, :].mean(-2, keepdim=True)
        elif bias is not None:
            bias = bias.any(-2, keepdim=True)
        return self._attention(inputs.patch_queries.mean(-2, keepdim=True), bias)

    def received_attention(self) -> Tensor:
        """Attention that every patch receives, ``[B, n]``, mean over all queries and heads.

        The full matrix is computed one head at a time, which needs memory of ``[B, N, N]``.

        Raises:
            InvalidOption: The block's attention is not available here.
        """
        inputs = self._need("attention received")
        total = inputs.q.new_zeros(self.x.shape[0], self.count, dtype=torch.float)
        for number in range(inputs.q.shape[1]):
            head, bias = slice(number, number + 1), inputs.bias
            bias = bias[:, head] if bias is not None and bias.shape[1] > 1 else bias
            logits = inputs.replace(q=inputs.q[:, head], k=inputs.k[:, head], bias=bias).logits()
            total = total + logits.float().softmax(-1)[:, 0, :, inputs.prefix :].mean(1)
        return total / inputs.q.shape[1]

    def _attention(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        inputs = self._need("attention")
        logits = inputs.replace(q=rows, bias=bias).logits()
        return logits.float().softmax(-1).mean((1, 2))[:, inputs.prefix :]

    def _need(self, what: str) -> AttentionInputs:
        if self.attention is None:
            raise InvalidOption(
                f"{what} at block {self.layer} needs the block's own attention: set "
                "place = 'middle' on the strategy"
            )
        return self.attention


class TokenPlanner(Protocol):
    """The planner of one block: takes `TokenInputs`, returns a `Reduction` or None for none.

    It is an `nn.Module` if it has weights; see `LearnedTokenPlanner`.
    """

    def __call__(self, tokens: TokenInputs, /) -> Reduction | None: ...


class LearnedTokenPlanner(PlannerWeights):
    """Base of token planners with weights, which are named ``<site>.sparsiattn.*`` in the model.

    Override ``forward(tokens)``, which takes `TokenInputs` and returns a `Reduction` or None. A
    checkpoint of the dense model still loads strictly: weights that it lacks keep their values.
    Initial weights must come from a private generator, so that patching does not change the global
    random state and ``reset_parameters()`` gives the same values again.

    >>> class Scored(LearnedTokenPlanner):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(width))
    ...     def forward(self, tokens):
    ...         return Reduction.top(tokens.x @ self.weight, 0.5)
    >>> sorted(Scored(8).state_dict())
    ['weight']
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, tokens: TokenInputs) -> Reduction | None:
        raise NotImplementedError(f"{type(self).__name__} must override forward(tokens)")


@dataclass(frozen=True)
class TokenStrategy(Config):
    """Decides which tokens later blocks carry.

    Subclass it as a frozen dataclass, set ``name`` and override `reduce` (or `planner`, if it has
    weights).

    Args:
        layers: 0-based indices of the blocks where tokens are reduced; None is a quarter, half and
            three quarters of the depth.
        restore: ``"auto"`` keeps the sequence short for classification and restores original
            positions for callers that need features. ``"unfold"`` and ``"scatter"`` always restore
            them after the last block (see `TokenState.restore_patches`), None never does.

    Attributes:
        per_layer: Names of options that may be a list with one value per layer, or a function of
            the `Site`.
        place: Where in the block tokens are reduced: at its ``"entry"``, in the ``"middle"``
            (between attention and MLP) or at its ``"exit"``.
        needs_attention: Whether `reduce` reads ``tokens.attention``.
        needs_grid: Whether `reduce` needs patches in raster order.

    >>> from dataclasses import dataclass
    >>> from sparsiattn import Reduction, TokenStrategy
    >>> @dataclass(frozen=True)
    ... class Loudest(TokenStrategy):
    ...     name = "loudest"
    ...     keep: float = 0.7
    ...     def reduce(self, tokens):
    ...         return Reduction.top(tokens.x.norm(dim=-1), self.keep)
    >>> Loudest(keep=0.5).to_dict()["options"]["keep"]
    0.5
    """

    renamed_members: ClassVar[Mapping[str, str]] = {
        **Config.renamed_members,
        "at": "resolve_for",
        "adapted": "for_model",
        "reduces_at": "placement",
        "ragged": "is_ragged",
    }

    kind = "tokens"
    per_layer: ClassVar[tuple[str, ...]] = ("keep",)
    place: ClassVar[Place] = "middle"
    needs_attention: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    layers: Sequence[int] | None = field(default=None, kw_only=True)
    restore: str | None = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _check_layers(self.layers))
        for name in self.per_layer:
            if isinstance(getattr(self, name, None), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.restore not in RESTORE:
            raise InvalidOption(f"restore must be one of {RESTORE}, got {self.restore!r}")

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        """The reduction at one block; None keeps all tokens."""
        raise NotImplementedError(
            f"{type(self).__name__} must override reduce(tokens), or planner(site) if it learns"
        )

    def planner(self, site: Site, width: int) -> TokenPlanner:
        """Make the planner for the block of ``site``, whose tokens have ``width`` channels."""
        return StatelessTokens(self)

    def placement(self) -> Place:
        """Where in the block tokens are reduced; override it if `place` depends on options."""
        return self.place

    def reads_attention(self) -> bool:
        """Whether `reduce` reads attention; override it if this depends on options."""
        return self.needs_attention

    def proportional_attention(self) -> bool:
        """Whether keys are weighted by the sizes of their tokens after the first reduction."""
        return False

    def merges(self) -> bool:
        """Whether a token may stand for several patches, so that plain averages would be wrong."""
        return False

    def skips_windows(self) -> bool:
        """Whether complete windows skip blocks in models whose grid must stay complete."""
        return False

    def check(self, tokens: int, first: bool) -> None:
        """Check the budget at one reduction.

        Args:
            tokens: Number of patch tokens there.
            first: Whether it is the first reduction.

        Raises:
            InvalidOption: The budget is larger than the number of tokens.
        """

    def for_model(self, class_tokens: int, windowed: bool, model: str) -> TokenStrategy:
        """This config, adapted to one model.

        Args:
            class_tokens: Number of CLS and distillation tokens.
            windowed: Whether the model attends in windows.
            model: Name of the model, for errors.

        Raises:
            InvalidOption: The model does not support an option.
        """
        return self

    def is_ragged(self) -> bool:
        """Whether images may keep different numbers of tokens."""
        return False

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The block indices that are used if ``layers`` is None."""
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))

    def layers_in(self, depth: int) -> tuple[int, ...]:
        """The block indices where tokens are reduced in a model of ``depth`` blocks.

        Raises:
            InvalidOption: An index in ``layers`` is too large.
        """
        layers = self.default_layers(depth) if self.layers is None else tuple(self.layers)
        bad = [layer for layer in layers if layer >= depth]
        if bad:
            raise InvalidOption(f"layers must be block indices in 0..{depth - 1}, got {bad}")
        return layers

    def resolve_for(self, site: Site, position: int, count: int) -> TokenStrategy:
        """This config with single values instead of lists and functions.

        Args:
            site: The site of the block that reduces.
            position: Index of the block among those that reduce.
            count: Number of blocks that reduce.

        Raises:
            InvalidOption: The number of values in a list is not ``count``.
        """
        names = [name for name in self.per_layer if name in self.option_names()]
        return replace(self, **{n: self._resolve(n, site, position, count) for n in names})

    def _resolve(self, name: str, site: Site, position: int, count: int) -> Any:
        value = getattr(self, name)
        if callable(value):
            return value(site)
        if not isinstance(value, (list, tuple)):
            return value
        if len(value) != count:
            raise InvalidOption(
                f"{name} as a list needs one value per reducing layer: {count}, got {len(value)}"
            )
        return value[position]


@dataclass(frozen=True)
class StatelessTokens:
    """A planner without state, which calls the strategy's `reduce`."""

    strategy: TokenStrategy

    def __call__(self, tokens: TokenInputs, /) -> Reduction | None:
        return self.strategy.reduce(tokens)


def _check_layers(layers: object) -> tuple[int, ...]:
    indices = list(layers) if isinstance(layers, (list, tuple, range)) else []
    if not indices or not all(type(layer) is int and layer >= 0 for layer in indices):
        raise InvalidOption(
            f"layers must be a list of block indices, 0-based and at least one, got {layers!r}"
        )
    if indices != sorted(set(indices)):
        raise InvalidOption(f"layers must be in ascending order without repeats, got {indices}")
    return tuple(indices)
