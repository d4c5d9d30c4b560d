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
"""Where a block reduces its tokens.

"entry" is before its attention, "middle" between attention and MLP, "exit" after the block (also
if the block has no separate MLP branch). The other two keep the token grid: with "bypass" dropped
tokens skip only the MLP, with "windows" dropped windows skip the whole block.
"""
KEEP_GRID: tuple[Placement, ...] = ("bypass", "windows")


@dataclass(eq=False)
class BlockRuntime:
    """One block of a model that carries fewer tokens: plain state that copies and pickles.

    Attributes:
        block: Name and structure of the block.
        site: Its first attention call.
        index: Position among the model's blocks, from 0.
        depth: Number of blocks that the block's sequence passes through.
        owner: The patch.
        class_tokens: Leading prefix tokens that are class tokens.
        rows: The site that describes the special tokens of the block's sequences; usually ``site``.
        strategy: The token strategy with this block's budget; None if the block does not reduce.
        planner: The planner that the strategy made for this block; None if it does not reduce.
        placement: Where the block reduces; None if it does not.
        cut: How the block's map is divided into windows, if windows can skip the block.
        first: Whether it is the first block that carries a token state.
        last: Whether it is the last one.
        start: Index of the first block that the same sequence passes through.
        repeated: Whether the sequence passes through some of its blocks more than once.
        restores: Whether something besides the next block reads the block's output by position.
        entered: Recompute cache for checkpoints around the block: by the block's input, its token
            state and whether every block restored original positions in that pass.
        inside: The same by the input of the block's first module, for checkpoints inside the block.
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
        """Whether every sequence is one of several per image (frames of a video, tiles)."""
        return self.block.input_shape[:-1] == (self.rows.windows, self.rows.tokens)

    @property
    def wants_attention(self) -> bool:
        """Whether the reduction reads this block's queries and keys."""
        return self.strategy is not None and self.strategy.reads_attention()

    def branch(self, module: nn.Module) -> Tensor:
        """The output of this block's MLP branch, which `LeaveTail` withheld from the host.

        Args:
            module: The block.
        """
        output, tail = BLOCK_CALL.mlp_output, self.block.tail
        assert output is not None
        assert tail is not None
        return output if tail.factor is None else output * getattr(module, tail.factor)

    def is_off(self) -> bool:
        """Whether the host's own forward runs, as the patch is disabled here or was undone."""
        return self.owner.disabled_here or not self.owner.alive

    def owns(self, state: Carried | None) -> bool:
        """Whether a token state of this thread belongs to this patch's model."""
        return state is not None and state.owner == self.owner.key

    def begin(self, x: Tensor) -> TokenState:
        """The token state of a sequence that still has every token."""
        site, maps = self.rows, self.owner.maps()
        n = x.shape[1] - site.prefix_tokens if x.dim() == 3 else x.shape[1:-1].numel()
        if x.dim() == 4:  # a map [B, H, W, C], which the block itself divides into windows
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
            state: The state that the previous block left in this thread. A checkpointed block that
                runs again in the backward pass looks up the state noted for this very tensor.
        """
        again = self.repeated and state is not None and state.returned is x and self.owns(state)
        if again and state is not None:
            state = replace(state, layer=self.index)
        elif self.first:
            forget_abandoned()  # otherwise its clean-up would delete the state of this pass
            state = self.begin(x)
        else:
            state = self._recall(x, state)
        state = self._with_gradient(state, x)
        self.note(x, state)
        return state

    def _with_gradient(self, state: Carried, x: Tensor) -> Carried:
        """The state, with its short sequence taken from the block's input if only that has a grad.

        This is the case after a reentrant checkpoint, where only the output has a gradient.
        """
        short = state.sequence
        if torch.compiler.is_compiling() or short is None or short.requires_grad:
            return state
        if not x.requires_grad or (isinstance(state, TokenState) and not state.steps):
            return state
        if isinstance(state, PackedTokens) or any(s.fused or s.unfold for s in state.steps):
            raise ModelChanged(
                f"block {self.block.name!r} takes tokens from a checkpoint with "
                "use_reentrant=True, which would lose their gradient: use use_reentrant=False"
            )
        return replace(self._followed(state, x), last=state.split_suffix(x)[0][:, state.prefix :])

    def restoring(self, x: Tensor) -> bool:
        """Whether every block restores original positions in the pass that this input belongs to.

        This is the case if the caller asked for features, or if blocks are not called from the
        patched model's own forward. A checkpoint that runs the block again repeats the decision of
        the first run.

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
                f"block {self.block.name!r} was called from outside the patched model's forward, "
                "where every position is needed, but the patch was made with restore=None, which "
                "never restores tokens: use restore='auto'"
            )
        return True

    def _recall(self, x: Tensor, state: Carried | None) -> Carried:
        # the state of another model in this thread, or a checkpoint that runs this block again
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
            f"block {self.block.name!r} ran on its own with {x.shape[1]} tokens, but only block "
            f"{self.index - 1} knows which tokens are left; run the whole model (and no other "
            "patched model from a hook between its blocks), or unpatch() first"
        )

    def _followed(self, state: Carried, x: Tensor) -> Carried:
        """The state for an input that is another tensor than the previous block returned."""
        if state.sequence is None:
            self._refuse_other_count(state, x)
            return state
        if isinstance(state, PaddedTokens):
            return replace(state, sequence=state.follow(x))
        if isinstance(state, PackedTokens):
            raise ModelChanged(
                f"the input of block {self.block.name!r} was changed between blocks. This is not "
                "possible when features are requested and images with different numbers of tokens "
                "are packed: use a fixed keep"
            )
        return replace(state, sequence=take(x, state.tokens()))

    def _refuse_other_count(self, state: Carried, x: Tensor) -> None:
        """Refuse an input with another number of tokens than the previous block returned.

        A host that writes to the block's input in place causes that.
        """
        if not isinstance(state, TokenState) or state.ids is None:
            return
        count = state.prefix + state.ids.shape[1]
        if x.shape[1] != count:
            raise ModelChanged(
                f"block {self.block.name!r} got {x.shape[1]} tokens, but the previous block "
                f"returned {count}: each block must take the output of the previous one"
            )

    def note(self, x: Tensor, state: Carried, *, inside: bool = False) -> None:
        """Store the state for a backward pass that recomputes this block, or part of it."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or x.requires_grad):
            return
        if is_functorch(x):
            return
        # the stored state must not hold ``x``, or ``x`` would live as long as the cache
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
        """Reduce every image separately; the sequence is unchanged if no image drops a token."""
        images = list(state.parts(x, BLOCK_CALL.attention))
        reduced = [self._apply(self.plan(*image), *image[:2]) for image in images]
        states = tuple(after for after, _ in reduced)
        if all(len(a.steps) == len(b.steps) for a, b in zip(states, state.states, strict=True)):
            return replace(state, states=states), x
        return state.advanced(reduced)

    def restores_now(self) -> bool:
        """Whether original positions are restored after this block in the current pass."""
        return BLOCK_CALL.restoring or self.restores or (self.last and self._padding_needs_all())

    def _padding_needs_all(self) -> bool:
        """Whether the model's head reads tokens by the positions in a padding mask.

        Those are positions in the original batch, so all tokens must be restored, unless the head
        reads only prefix tokens.

        Raises:
            InvalidOption: The patch was made with ``restore=None``.
        """
        owner = self.owner
        if not BLOCK_CALL.masked or owner.reads_prefix:
            return False
        if owner.tokens is not None and owner.tokens.restore is None:
            raise InvalidOption(
                f"{type(owner.model).__name__} got a mask for padded images, so its head may need "
                "every token at its original position, but the patch was made with restore=None, "
                "which never restores tokens: use restore='auto'"
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
        """The state after choosing which tokens skip the MLP, or which windows skip the block.

        Args:
            state: The state before.
            kept: ``[B, P + n, C]``, the tokens to choose from; for windows, one token each.
        """
        reduction = self.plan(state, kept, None)
        if reduction is None:
            return state
        if isinstance(reduction, Policy):
            return replace(state, policy=reduction.policy)
        index: Tensor | None = getattr(reduction, "index", None)
        if index is None:
            raise InvalidOption(
                f"block {self.block.name!r} must keep its token grid, so every image has to skip "
                "the same number of tokens: use a fixed keep, e.g. keep=0.7"
            )
        return state.advance(ReductionStep(index, None, kept.shape[1] - state.prefix))

    def plan(
        self, state: TokenState, x: Tensor, attention: AttentionInputs | None
    ) -> Reduction | None:
        """The reduction that the planner chooses for these tokens; None for no reduction."""
        assert self.planner is not None
        if attention is not None and attention.q.shape[0] != x.shape[0]:
            raise InvalidOption(
                f"block {self.block.name!r} computes attention for {attention.q.shape[0]} of "
                f"{x.shape[0]} images (stochastic depth on part of the batch?), so the others have "
                "no scores: set its drop rate to 0, or use a score that reads no attention, e.g. "
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
        """Refuse a policy from a reentrant checkpoint, which would lose its gradient."""
        policy = getattr(state, "policy", None)
        if policy is not None and torch.is_grad_enabled() and not policy.requires_grad:
            raise ModelChanged(
                f"block {self.block.name!r} is checkpointed with use_reentrant=True, which would "
                "lose the gradient of learned token scores: checkpoint with use_reentrant=False"
            )

    def refuse_reentrant(self, host: Any, reduced: Tensor) -> None:
        """Refuse reduced tokens from a reentrant checkpoint, which would get no gradient."""
        if torch.is_grad_enabled() and host.requires_grad and not reduced.requires_grad:
            raise ModelChanged(
                f"block {self.block.name!r} checkpoints its own forward with use_reentrant=True, "
                "which would lose the gradient of reduced tokens: enable gradient checkpointing "
                "with use_reentrant=False"
            )
