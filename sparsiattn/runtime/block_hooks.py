"""The hooks of a block that carries fewer tokens.

Blocks ``y = x + f(x)`` reduce between attention and MLP: a pre-hook of the first module of ``f``
passes on the reduced tokens, a hook of its last module stores the result and returns zeros for the
host's addition, and the block's own hook returns the sum. Position tables among a block's arguments
are reduced with the tokens; masks are reduced where attention is intercepted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.packed import PackedTokens, unpack
from sparsiattn.attention.padded import PaddedTokens
from sparsiattn.attention.token_state import TokenState
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.hook_tools import first_argument, first_tensor, refuse_fx, replace_first
from sparsiattn.runtime.no_branch import no_branch
from sparsiattn.runtime.ownership import runs_in_another
from sparsiattn.runtime.padded_attention import begin_padded, padding_among
from sparsiattn.runtime.thread_state import BLOCK_CALL, Carried


@dataclass(eq=False)
class BlockHook:
    """Base of a block's hooks.

    Attributes:
        runtime: The block that the hook belongs to.
    """

    runtime: BlockRuntime


class EnterBlock(BlockHook):
    """Forward pre-hook of a block: passes it the short sequence and matching position tables."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        runtime = self.runtime
        refuse_fx((*args, *kwargs.values()))
        BLOCK_CALL.begin(runtime.wants_attention)
        if runtime.is_off() or runs_in_another(runtime.owner, module):
            BLOCK_CALL.token_state = None
            return None
        x = first_argument(args, kwargs)
        assert x is not None
        BLOCK_CALL.restoring = runtime.restoring(x)
        state = runtime.enter(x, BLOCK_CALL.token_state)
        tokens = x if state.sequence is None else state.sequence
        if runtime.placement == "entry":
            state = self._with_padding(state, (args, kwargs), tokens)
            state, tokens = runtime.reduce(state, tokens)
        # set before attention runs: the site's route reads the remaining tokens from here
        BLOCK_CALL.token_state = state
        runtime.note(tokens, state, inside=True)
        if not state.reduced:
            return None
        return _exchanged((args, kwargs), x, tokens, state, runtime.block.adds_heads)

    def _with_padding(self, state: Carried, arguments: Any, x: Tensor) -> Carried:
        """The state with each image's padding, read from a mask among the block's arguments.

        Elsewhere padding is found when attention is called, but a reduction at the entry comes
        before that.
        """
        if not isinstance(state, TokenState) or state.reduced:
            return state
        BLOCK_CALL.masked, own = padding_among(arguments, x, state.prefix)
        runtime = self.runtime
        if own is None:
            return state
        return begin_padded(runtime.site, runtime.owner.maps(), state, own)


def _exchanged(arguments: Any, x: Tensor, tokens: Tensor, state: Carried, adds_heads: bool) -> Any:
    """The block's arguments with its input replaced and its position tables reduced."""
    args, kwargs = arguments
    if not kwargs and len(args) == 1 and args[0] is x:
        return (tokens,), {}
    context = x, tokens, state, adds_heads
    # with as many images as patches, a mask looks like a position table; masks are reduced where
    # attention uses them
    fitted = {name: a if "mask" in name else _fitted(a, *context) for name, a in kwargs.items()}
    return tuple(_fitted(a, *context) for a in args), fitted


# A module-level function, as a recursive closure is a reference cycle, which keeps activations
# alive until the garbage collector runs.
def _fitted(value: Any, x: Tensor, tokens: Tensor, state: Carried, adds_heads: bool) -> Any:
    """One argument of a block: the input is replaced, a position table is reduced."""
    if value is x:
        return tokens
    if isinstance(value, Tensor) and value.dim() == 3 and adds_heads:
        return state.fit_side(value[:, None])[:, 0]
    if isinstance(value, Tensor):
        return state.fit_side(value)
    if isinstance(value, tuple):
        return tuple(_fitted(part, x, tokens, state, adds_heads) for part in value)
    return value


class ReopenBlock(BlockHook):
    """Forward pre-hook of the first module in a block.

    If only the block's forward is checkpointed (as in transformers), the backward pass runs it
    again without calling the block's own hooks. This hook then restores the block's state.
    """

    def __call__(self, module: nn.Module, args: Any) -> None:
        runtime = self.runtime
        if torch.compiler.is_compiling() or not runtime.inside or runtime.is_off():
            return
        slot = "bypass_state" if runtime.placement == "bypass" else "token_state"
        state = getattr(BLOCK_CALL, slot)
        if state is not None and state.layer == runtime.index:
            return
        noted = runtime.inside.find(args[0]) if args else None
        if noted is not None:
            state, BLOCK_CALL.restoring = noted
            setattr(BLOCK_CALL, slot, state)
            BLOCK_CALL.begin(runtime.wants_attention)


class EnterTail(BlockHook):
    """Forward pre-hook of the MLP branch's first module: passes on the reduced tokens."""

    def __call__(self, module: nn.Module, args: Any) -> Any:
        state = BLOCK_CALL.token_state
        if self.runtime.is_off() or state is None or not self.runtime.owns(state):
            return None
        x = args[0]
        state, reduced = self.runtime.reduce(state, x)
        BLOCK_CALL.attention = None  # free queries and keys before the MLP runs
        if reduced is x:
            BLOCK_CALL.token_state = state
            return None
        BLOCK_CALL.mlp_input = (state, reduced)
        return (reduced, *args[1:])


class LeaveTail:
    """Forward hook of the MLP branch's last module: stores its result for `LeaveBlock`."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        if BLOCK_CALL.mlp_input is None:
            return None
        BLOCK_CALL.mlp_output = output
        return no_branch(output)


class LeaveBlock(BlockHook):
    """Forward hook of a block: returns its output with fewer tokens.

    If a later consumer needs the original positions, the output is restored to them.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        runtime, state = self.runtime, BLOCK_CALL.token_state
        if state is None or not runtime.owns(state) or runtime.is_off():
            return None
        host = first_tensor(output)
        assert host is not None
        tokens = host
        if BLOCK_CALL.mlp_input is not None:
            state, reduced = BLOCK_CALL.mlp_input
            runtime.refuse_reentrant(host, reduced)
            tokens = reduced + runtime.branch(module)
            BLOCK_CALL.mlp_input = BLOCK_CALL.mlp_output = None
        elif runtime.placement == "exit":
            state, tokens = runtime.reduce(state, tokens)
        BLOCK_CALL.attention = None
        returned = self._returned(state, tokens)
        sequence = None if returned is tokens else tokens
        state = replace(state, layer=runtime.index + 1, sequence=sequence, returned=returned)
        BLOCK_CALL.token_state = state if runtime.repeated or not runtime.last else None
        if not torch.compiler.is_compiling():  # a write to the patch would break the graph
            runtime.owner.note_block((state.bare(), tokens.shape[0]))
        return None if returned is host else replace_first(output, host, returned)

    def _returned(self, state: Carried, tokens: Tensor) -> Tensor:
        """The block's output: original positions for dense consumers, else the short sequence."""
        if not state.reduced:
            return tokens
        if self.runtime.restores_now():
            return state.restore_sequence(tokens, self.runtime.owner.restore_mode)
        padded = isinstance(state, PaddedTokens)
        if self.runtime.last and isinstance(state, PackedTokens) and not padded:
            return unpack(tokens, state)
        return tokens
