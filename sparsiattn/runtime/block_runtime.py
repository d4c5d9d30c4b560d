"""`BlockRuntime`: what happens to the tokens at one block of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sparsiattn.attention.block import Block
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import patch_grid
from sparsiattn.attention.packed import PackedTokens, pack
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import ReductionStep, TokenState, take
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.runtime.hook_tools import RecomputeCache, is_functorch
from sparsiattn.runtime.metering import metered
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.thread_state import BLOCK_CALL, Carried
from sparsiattn.strategies.reduction import KeepRagged, Policy, Reduction
from sparsiattn.strategies.token_base import TokenInputs, TokenPlanner, TokenStrategy

Placement = Literal["entry", "middle", "exit", "bypass"]
"""Where a block reduces: before its attention, between attention and MLP, after it (also where it
has no tail), or nowhere, as the grid must stay and dropped tokens skip the MLP only."""


@dataclass(eq=False)
class BlockRuntime:
    """One block of a model that carries fewer tokens: plain state that copies and pickles.

    Attributes:
        block: Where it is and how it ends.
        site: Its first attention call.
        index: Position among the model's blocks, from 0.
        depth: Number of blocks of the model.
        owner: The patch.
        class_tokens: Leading prefix tokens that are class tokens.
        strategy: The token strategy with this block's budget; None if the block does not reduce.
        planner: What the strategy made for this block.
        placement: Where the block reduces; None if it does not.
        first: Whether no block before it carries a token state.
        last: Whether no block after it does.
        entered: Token states by the block's input, for checkpoints around the block.
        inside: Token states by the input of its first module, for checkpoints inside it.
    """

    block: Block
    site: Site
    index: int
    depth: int
    owner: PatchOwner
    class_tokens: int
    strategy: TokenStrategy | None = None
    planner: TokenPlanner | None = None
    placement: Placement | None = None
    first: bool = False
    last: bool = False
    entered: RecomputeCache[Carried] = field(default_factory=RecomputeCache)
    inside: RecomputeCache[Carried] = field(default_factory=RecomputeCache)

    @property
    def wants_attention(self) -> bool:
        """Whether the reduction reads this block's queries and keys."""
        return self.strategy is not None and self.strategy.reads_attention()

    def is_off(self) -> bool:
        """Whether the host's own forward runs: the patch is disabled here, or undone."""
        return self.owner.disabled_here or not self.owner.alive

    def owns(self, state: Carried | None) -> bool:
        """Whether a token state of this thread is of this patch's model."""
        return state is not None and state.owner == self.owner.key

    def begin(self, x: Tensor) -> TokenState:
        """The token state of a block that takes every token."""
        prefix = self.site.prefix_tokens
        n = x.shape[1] - prefix if x.dim() == 3 else x.shape[1:-1].numel()
        grid = patch_grid(self.site.grid, n, self.site, self.owner.image_grid())
        return TokenState(self.owner.key, prefix, grid, self.index)

    def enter(self, x: Tensor, state: Carried | None) -> Carried:
        """The token state that belongs to this input of the block.

        Args:
            x: The block's input.
            state: What the block before handed on in this thread. A checkpointed block that runs
                again in the backward pass finds the state that came with this very tensor.
        """
        state = self.begin(x) if self.first else self._recall(x, state)
        self.note(x, state)
        return state

    def _recall(self, x: Tensor, state: Carried | None) -> Carried:
        # another model of this thread, or a checkpoint that runs this block out of its turn
        if state is not None and (state.owner, state.layer) != (self.owner.key, self.index):
            state = None
        if state is not None and (torch.compiler.is_compiling() or state.returned is x):
            return state
        noted = self.entered.find(x)
        if noted is not None:
            self._refuse_lost_policy(noted)
            return noted
        if state is not None:
            return self._followed(state, x)
        raise ModelChanged(
            f"block {self.block.name!r} ran on its own: which of its {x.shape[1]} tokens are left "
            f"is only known after block {self.index - 1}; run the whole model, or unpatch() first"
        )

    def _followed(self, state: Carried, x: Tensor) -> Carried:
        """The state where something between two blocks handed on another tensor than returned."""
        if state.sequence is None:
            self._refuse_other_count(state, x)
            return state
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
        (self.inside if inside else self.entered).note(x, kept)

    @metered
    def reduce(self, state: Carried, x: Tensor) -> tuple[Carried, Tensor]:
        """The sequence ``[B, N, C]`` after this block's reduction, prefix included."""
        attention = BLOCK_CALL.attention
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

    def _apply(
        self, reduction: Reduction | None, state: TokenState, x: Tensor
    ) -> tuple[TokenState, Tensor]:
        if reduction is None:
            return state, x
        if self.owner.restores_at(last=True) and not isinstance(reduction, Policy):
            state = state.remember(x[:, state.prefix :])
        return reduction.apply(state, x)

    @metered
    def spare(self, state: TokenState, kept: Tensor) -> TokenState:
        """The state after it was decided which of these tokens ``[B, P + n, C]`` skip the MLP."""
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
        return self.planner(
            TokenInputs(
                x[:, state.prefix :],
                self.site,
                attention,
                self.index,
                self.depth,
                self.class_tokens,
                size=state.size,
                policy=state.policy,
                training=self.owner.training,
                grid=state.grid,
                ids=state.ids,
            )
        )

    def _refuse_lost_policy(self, state: Carried) -> None:
        """A policy drawn in a reentrant checkpoint reaches later blocks without its gradient."""
        policy = state.policy if isinstance(state, TokenState) else None
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
