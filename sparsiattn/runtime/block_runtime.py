"""`BlockRuntime`: what happens to the tokens at one block of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sparsiattn.attention.block import Block
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import patch_grid, stage_grid
from sparsiattn.attention.packed import PackedTokens, pack
from sparsiattn.attention.padded import PaddedTokens
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import ReductionStep, TokenState, take
from sparsiattn.attention.windows import WindowCut
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.runtime.hook_tools import RecomputeCache, is_functorch
from sparsiattn.runtime.metering import metered
from sparsiattn.runtime.ownership import is_inside
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.sdpa_intercept import forget_abandoned
from sparsiattn.runtime.thread_state import BLOCK_CALL, MODEL_CALL, Carried, in_backward
from sparsiattn.strategies.reduction import KeepRagged, Policy, Reduction
from sparsiattn.strategies.token_base import TokenInputs, TokenPlanner, TokenStrategy

Placement = Literal["entry", "middle", "exit", "bypass", "windows"]
"""Where a block reduces: before its attention, between attention and MLP, after it (also where it
has no tail), or nowhere, as the grid must stay: dropped tokens skip the MLP only, dropped windows
the whole block."""
KEEP_GRID: tuple[Placement, ...] = ("bypass", "windows")


@dataclass(eq=False)
class BlockRuntime:
    """One block of a model that carries fewer tokens: plain state that copies and pickles.

    Attributes:
        block: Where it is and how it ends.
        site: Its first attention call.
        index: Position among the model's blocks, from 0.
        depth: Number of blocks that hand on its sequence.
        owner: The patch.
        class_tokens: Leading prefix tokens that are class tokens.
        rows: A site, most often its first, that tells where special tokens of its sequences are.
        strategy: The token strategy with this block's budget; None if the block does not reduce.
        planner: What the strategy made for this block.
        placement: Where the block reduces; None if it does not.
        cut: How its windows lie in its map, where whole ones skip it.
        first: Whether no block before it carries a token state.
        last: Whether no block after it does.
        start: Index of the first block that hands on the same sequence.
        repeated: Whether that sequence takes some of its blocks more than once.
        restores: Whether something besides the next block reads its output by position.
        entered: Token states, and whether every block restored, by the block's input, for
            checkpoints around the block.
        inside: Token states by the input of its first module, for checkpoints inside it.
    """

    block: Block
    site: Site
    index: int
    depth: int
    owner: PatchOwner
    class_tokens: int
    rows: Site
    strategy: TokenStrategy | None = None
    planner: TokenPlanner | None = None
    placement: Placement | None = None
    cut: WindowCut | None = None
    first: bool = False
    last: bool = False
    start: int = 0
    repeated: bool = False
    restores: bool = False
    entered: RecomputeCache[tuple[Carried, bool]] = field(default_factory=RecomputeCache)
    inside: RecomputeCache[tuple[Carried, bool]] = field(default_factory=RecomputeCache)

    @property
    def by_rows(self) -> bool:
        """Whether each sequence that it hands on is one of several images (frames, tiles)."""
        return self.block.input_shape[:-1] == (self.rows.windows, self.rows.tokens)

    @property
    def wants_attention(self) -> bool:
        """Whether the reduction reads this block's queries and keys."""
        return self.strategy is not None and self.strategy.reads_attention()

    def branch(self, module: nn.Module) -> Tensor:
        """What this block's MLP branch adds, as it was kept from the host's own addition.

        Args:
            module: The block.
        """
        output, tail = BLOCK_CALL.mlp_output, self.block.tail
        assert output is not None
        assert tail is not None
        return output if tail.factor is None else output * getattr(module, tail.factor)

    def is_off(self) -> bool:
        """Whether the host's own forward runs: the patch is disabled here, or undone."""
        return self.owner.disabled_here or not self.owner.alive

    def owns(self, state: Carried | None) -> bool:
        """Whether a token state of this thread is of this patch's model."""
        return state is not None and state.owner == self.owner.key

    def begin(self, x: Tensor) -> TokenState:
        """The token state of a block that takes every token."""
        site, maps = self.rows, self.owner.maps()
        n = x.shape[1] - site.prefix_tokens if x.dim() == 3 else x.shape[1:-1].numel()
        if x.dim() == 4:  # a map [B, H, W, C], which is cut into windows behind this
            grid = x.shape[1], x.shape[2]
        elif site.windows > 1 and not self.by_rows:
            grid = stage_grid(n, maps) or (1, n)
        else:
            grid = patch_grid(site.grid, n, site, maps) or (1, n)
        return TokenState(
            self.owner.key, site.leading_tokens, grid, self.index, suffix=site.suffix_tokens
        )

    def enter(self, x: Tensor, state: Carried | None) -> Carried:
        """The token state that belongs to this input of the block.

        Args:
            x: The block's input.
            state: What the block before handed on in this thread. A checkpointed block that runs
                again in the backward pass finds the state that came with this very tensor.
        """
        again = self.repeated and state is not None and state.returned is x and self.owns(state)
        if again and state is not None:
            state = replace(state, layer=self.index)
        elif self.first:
            forget_abandoned()  # or its end would take with it what this pass hands on
            state = self.begin(x)
        else:
            state = self._recall(x, state)
        state = self._with_gradient(state, x)
        self.note(x, state)
        return state

    def _with_gradient(self, state: Carried, x: Tensor) -> Carried:
        """The state, its short sequence cut from the block's input where only that has a gradient.

        So it is behind a reentrant checkpoint: nothing that leaves it past its output has one.
        """
        short = state.sequence
        if torch.compiler.is_compiling() or short is None or short.requires_grad:
            return state
        if not x.requires_grad or (isinstance(state, TokenState) and not state.steps):
            return state
        if isinstance(state, PackedTokens) or any(s.fused or s.unfold for s in state.steps):
            raise ModelChanged(
                f"block {self.block.name!r} takes tokens from a checkpoint with "
                "use_reentrant=True, which would lose their gradient: checkpoint with "
                "use_reentrant=False"
            )
        return replace(self._followed(state, x), last=state.split_suffix(x)[0][:, state.prefix :])

    def restoring(self, x: Tensor) -> bool:
        """Whether every block gives original positions back in the pass that brought this input.

        So it is where the caller asked for features, and where blocks are not called by the
        patched model's own forward. A checkpoint that runs the block again does as at first.

        Args:
            x: The block's input.
        """
        noted = self.entered.find(x) if in_backward() else None
        if noted is not None:
            return noted[1]
        if self.owner.key in MODEL_CALL.features:
            return True
        if not self.owner.shortens or is_inside(self.owner):
            return False
        if self.owner.tokens is not None and self.owner.tokens.restore is None:
            raise InvalidOption(
                f"block {self.block.name!r} was called from outside of the patched model's "
                "forward, where every position is needed, and the patch was made with "
                "restore=None, which never puts tokens back: use restore='auto'"
            )
        return True

    def _recall(self, x: Tensor, state: Carried | None) -> Carried:
        # another model of this thread, or a checkpoint that runs this block out of its turn
        if state is not None and (state.owner, state.layer) != (self.owner.key, self.index):
            state = None
        if state is not None and (torch.compiler.is_compiling() or state.returned is x):
            return state
        noted = self.entered.find(x)
        if noted is not None:
            self._refuse_lost_policy(noted[0])
            return noted[0]
        if state is not None:
            return self._followed(state, x)
        raise ModelChanged(
            f"block {self.block.name!r} ran on its own: which of its {x.shape[1]} tokens are left "
            f"is only known after block {self.index - 1}; run the whole model (no other patched "
            "model from a hook between its blocks), or unpatch() first"
        )

    def _followed(self, state: Carried, x: Tensor) -> Carried:
        """The state where something between two blocks handed on another tensor than returned."""
        if state.sequence is None:
            self._refuse_other_count(state, x)
            return state
        if isinstance(state, PaddedTokens):
            return replace(state, sequence=state.follow(x))
        if isinstance(state, PackedTokens):
            raise ModelChanged(
                f"the input of block {self.block.name!r} was changed between blocks, while images "
                "with their own numbers of tokens are packed and features were asked for: use a "
                "fixed keep"
            )
        return replace(state, sequence=take(x, state.tokens()))

    def _refuse_other_count(self, state: Carried, x: Tensor) -> None:
        """What a block returns is what the next must take: one may write to its input instead."""
        if not isinstance(state, TokenState) or state.ids is None:
            return
        count = state.prefix + state.ids.shape[1]
        if x.shape[1] != count:
            raise ModelChanged(
                f"block {self.block.name!r} got {x.shape[1]} tokens where the block before "
                f"returned {count}: what a block returns must be what the next one takes"
            )

    def note(self, x: Tensor, state: Carried, *, inside: bool = False) -> None:
        """Keep the state for a backward pass that runs this block, or its inside, again."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or x.requires_grad):
            return
        if is_functorch(x):
            return
        # nothing kept may be ``x`` itself, or it would live as long as the cache
        kept = replace(state, returned=None, sequence=None if inside else state.sequence)
        (self.inside if inside else self.entered).note(x, (kept, BLOCK_CALL.restoring))

    @metered
    def reduce(self, state: Carried, x: Tensor) -> tuple[Carried, Tensor]:
        """The sequence ``[B, N, C]`` after this block's reduction, prefix included."""
        attention = BLOCK_CALL.attention
        if isinstance(state, PaddedTokens):
            return self._reduce_padded(state, x)
        if isinstance(state, PackedTokens):
            images = state.parts(x, attention)
            return pack([self._apply(self.plan(*image), *image[:2]) for image in images])
        reduction = self.plan(state, x, cast("AttentionInputs | None", attention))
        if not isinstance(reduction, KeepRagged):
            return self._apply(reduction, state, x)
        parts = [
            self._apply(part, state, x[i : i + 1]) for i, part in enumerate(reduction.by_image())
        ]
        return pack(parts) if parts else (state, x)  # an empty batch has nothing to pack

    def _reduce_padded(self, state: PaddedTokens, x: Tensor) -> tuple[PaddedTokens, Tensor]:
        """Every image by its own tokens; the sequence as it is where none of them drops any."""
        images = list(state.parts(x, BLOCK_CALL.attention))
        reduced = [self._apply(self.plan(*image), *image[:2]) for image in images]
        states = tuple(after for after, _ in reduced)
        if all(len(a.steps) == len(b.steps) for a, b in zip(states, state.states, strict=True)):
            return replace(state, states=states), x
        return state.advanced(reduced)

    def restores_now(self) -> bool:
        """Whether the host gets original positions back after this block in the present pass."""
        return BLOCK_CALL.restoring or self.restores or (self.last and self._padding_needs_all())

    def _padding_needs_all(self) -> bool:
        """Whether a head that was given the mask of a padded batch goes by its positions.

        They are those of the batch as it came, unless the head reads prefix tokens alone.

        Raises:
            InvalidOption: The patch was made never to restore them.
        """
        owner = self.owner
        if not BLOCK_CALL.masked or owner.reads_prefix:
            return False
        if owner.tokens is not None and owner.tokens.restore is None:
            raise InvalidOption(
                f"{type(owner.model).__name__} got a mask for padded images, by which its head may "
                "read the positions of the batch as it came, and restore=None never puts tokens "
                "back: use restore='auto'"
            )
        return True

    def _apply(
        self, reduction: Reduction | None, state: TokenState, x: Tensor
    ) -> tuple[TokenState, Tensor]:
        if reduction is None:
            return state, x
        body, suffix = state.split_suffix(x) if state.suffix else (x, x)
        remembers = self.owner.restores_from(self.index) or self._padding_needs_all()
        if remembers and not isinstance(reduction, Policy):
            state = state.remember(body[:, state.prefix :])
        state, body = reduction.apply(state, body)
        return state, torch.cat([body, suffix], dim=1) if state.suffix else body

    @metered
    def spare(self, state: TokenState, kept: Tensor) -> TokenState:
        """The state after it was decided which of these tokens ``[B, P + n, C]`` skip the MLP.

        Or which windows, as one token each, skip the block.
        """
        reduction = self.plan(state, kept, None)
        if reduction is None:
            return state
        if isinstance(reduction, Policy):
            return replace(state, policy=reduction.policy)
        index: Tensor | None = getattr(reduction, "index", None)
        if index is None:
            raise InvalidOption(
                f"block {self.block.name!r} must keep its grid, so every image has to spare the "
                "same number of tokens: use a fixed keep, e.g. keep=0.7"
            )
        return state.advance(ReductionStep(index, None, kept.shape[1] - state.prefix))

    def plan(
        self, state: TokenState, x: Tensor, attention: AttentionInputs | None
    ) -> Reduction | None:
        """What the planner wants to become of these tokens."""
        assert self.planner is not None
        if attention is not None and attention.q.shape[0] != x.shape[0]:
            raise InvalidOption(
                f"block {self.block.name!r} attends in {attention.q.shape[0]} of {x.shape[0]} "
                "images (stochastic depth on a subset of the batch?), so that the others have no "
                "scores: set its drop rate to 0, or choose by what reads no attention, e.g. "
                "token_drop with score='norm'"
            )
        end = x.shape[1] - state.suffix
        return self.planner(
            TokenInputs(
                x[:, state.prefix : end],
                self.site,
                attention,
                self.index - self.start,
                self.depth,
                self.class_tokens,
                size=state.size,
                policy=state.policy,
                training=self.owner.training,
                grid=state.grid,
                ids=state.ids,
                ahead=state.prefix,
            )
        )

    def _refuse_lost_policy(self, state: Carried) -> None:
        """A policy drawn in a reentrant checkpoint reaches later blocks without its gradient."""
        policy = getattr(state, "policy", None)
        if policy is not None and torch.is_grad_enabled() and not policy.requires_grad:
            raise ModelChanged(
                f"block {self.block.name!r} is checkpointed with use_reentrant=True, which would "
                "lose the gradient of learned token scores: checkpoint with use_reentrant=False"
            )

    def refuse_reentrant(self, host: Any, reduced: Tensor) -> None:
        """Tokens that leave a reentrant checkpoint past its output would get no gradient."""
        if torch.is_grad_enabled() and host.requires_grad and not reduced.requires_grad:
            raise ModelChanged(
                f"block {self.block.name!r} checkpoints its own forward with use_reentrant=True, "
                "which would lose the gradient of reduced tokens: enable gradient checkpointing "
                "with use_reentrant=False"
            )
