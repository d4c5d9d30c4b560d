"""Blocks that must keep their token grid (windows, stages): dropped tokens skip only the MLP.

This is DynamicViT's extension to Swin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from sparsiattn.attention.token_state import TokenState, take
from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.block_hooks import BlockHook
from sparsiattn.runtime.hook_tools import first_argument, first_tensor, replace_first
from sparsiattn.runtime.ownership import runs_in_another
from sparsiattn.runtime.thread_state import BLOCK_CALL


class EnterSparedBlock(BlockHook):
    """Forward pre-hook of a block that keeps its grid: sets up the state of its tokens."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        runtime = self.runtime
        BLOCK_CALL.mlp_input = BLOCK_CALL.mlp_output = None
        if runtime.is_off() or runs_in_another(runtime.owner, module):
            BLOCK_CALL.bypass_state = None
            return
        BLOCK_CALL.restoring = False
        x = first_argument(args, kwargs)
        assert x is not None
        state = cast(TokenState, runtime.enter(x, BLOCK_CALL.bypass_state))
        runtime.note(x, state, inside=True)
        BLOCK_CALL.bypass_state = state


class EnterBypass(BlockHook):
    """Forward pre-hook of the MLP branch: only kept tokens pass through it."""

    def __call__(self, module: nn.Module, args: Any) -> Any:
        runtime, state = self.runtime, BLOCK_CALL.bypass_state
        if runtime.is_off() or state is None or not runtime.owns(state):
            return None
        self._refuse_training()
        x = args[0]
        # hierarchical models pass [B, H, W, C]
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if runtime.planner is not None:
            kept = take(tokens, state.tokens()) if state.reduced else tokens
            state = BLOCK_CALL.bypass_state = runtime.spare(state, kept)
        if state.policy is None and not state.reduced:
            return None
        mlp_tokens = take(tokens, state.tokens()) if state.reduced else x
        BLOCK_CALL.mlp_input = (state, mlp_tokens)
        return (mlp_tokens, *args[1:])

    def _refuse_training(self) -> None:
        tail, training = self.runtime.block.tail, self.runtime.owner.training
        if training and tail is not None and tail.eval_only:
            raise InvalidOption(
                f"block {self.runtime.block.name!r}: in training mode {tail.eval_only}, so no "
                "token can skip its MLP: train without the patch (or inside disabled()), or use an "
                "attention strategy such as 'connectivity'"
            )


class LeaveSparedBlock(BlockHook):
    """Forward hook of the block: adds the MLP's output to the tokens that passed through it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        runtime, state = self.runtime, BLOCK_CALL.bypass_state
        if runtime.is_off() or state is None or not runtime.owns(state):
            return None
        host = first_tensor(output)
        assert host is not None
        if BLOCK_CALL.mlp_input is None:
            BLOCK_CALL.bypass_state = replace(state, layer=runtime.index + 1, returned=host)
            return None
        (_, mlp_tokens), branch = BLOCK_CALL.mlp_input, runtime.branch(module)
        BLOCK_CALL.mlp_input = BLOCK_CALL.mlp_output = None
        runtime.refuse_reentrant(host, mlp_tokens)
        flat = host.reshape(host.shape[0], -1, host.shape[-1])
        if state.policy is not None:
            # in training every token takes the MLP, weighted by its score, for the gradient
            policy = nn.functional.pad(state.policy, (state.prefix, 0), value=1.0)
            out = flat + branch.reshape(flat.shape) * policy[..., None].to(branch.dtype)
        else:
            index = state.tokens()[..., None].expand(-1, -1, flat.shape[-1])
            out = flat.scatter_add(1, index, branch.to(flat.dtype))
        out = out.view(host.shape)
        BLOCK_CALL.bypass_state = replace(state, layer=runtime.index + 1, returned=out)
        return replace_first(output, host, out)
