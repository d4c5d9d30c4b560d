"""The hooks of a block that carries fewer tokens.

Blocks ``y = x + f(x)`` reduce between attention and MLP: a pre-hook of the first module of ``f``
passes on the reduced tokens, a hook of its last module keeps the result aside and gives zeros to
the host's addition, and the block's own hook returns the sum. Position tables among a block's
arguments are cut down with the tokens; masks are, where attention is intercepted.
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
        runtime: The block.
    """

    runtime: BlockRuntime


class EnterBlock(BlockHook):
    """Forward pre-hook of a block: hands it the short sequence and the position tables for it."""

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
        # before attention runs: the site's route looks here for the tokens that are left
        BLOCK_CALL.token_state = state
        runtime.note(tokens, state, inside=True)
        if not state.reduced:
            return None
        return _exchanged((args, kwargs), x, tokens, state, runtime.block.adds_heads)

    def _with_padding(self, state: Carried, arguments: Any, x: Tensor) -> Carried:
        """The state with the padding known that a mask among the arguments tells.

        Attention, which tells it elsewhere, comes after a reduction at the entry.
        """
        if not isinstance(state, TokenState) or state.reduced:
            return state
        BLOCK_CALL.masked, own = padding_among(arguments, x, state.prefix)
        runtime = self.runtime
        if own is None:
            return state
        return begin_padded(runtime.site, runtime.owner.maps(), state, own)


def _exchanged(arguments: Any, x: Tensor, tokens: Tensor, state: Carried, adds_heads: bool) -> Any:
    """The block's arguments with its input exchanged and its position tables cut down."""
    args, kwargs = arguments
    if not kwargs and len(args) == 1 and args[0] is x:
        return (tokens,), {}
    how = x, tokens, state, adds_heads
    # a mask of as many images as patches looks like a table, and is cut down where it is used
    tables = {name: a if "mask" in name else _fitted(a, *how) for name, a in kwargs.items()}
    return tuple(_fitted(a, *how) for a in args), tables


# no function inside of another that calls itself: such a pair keeps activations until garbage is
# collected
def _fitted(value: Any, x: Tensor, tokens: Tensor, state: Carried, adds_heads: bool) -> Any:
    """One argument of a block: its input exchanged, a position table cut down."""
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

    Where only the block's forward is checkpointed (transformers), the backward pass runs it again
    without the block's own hooks.
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
        BLOCK_CALL.attention = None  # queries and keys need not live through the MLP
        if reduced is x:
            BLOCK_CALL.token_state = state
            return None
        BLOCK_CALL.mlp_input = (state, reduced)
        return (reduced, *args[1:])


class LeaveTail:
    """Forward hook of the MLP branch's last module: keeps its result for `LeaveBlock`."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        if BLOCK_CALL.mlp_input is None:
            return None
        BLOCK_CALL.mlp_output = output
        return no_branch(output)


class LeaveBlock(BlockHook):
    """Forward hook of a block: its output with fewer tokens.

    Where somebody asks for original positions, the host gets those instead.
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
        """What the host gets: original positions for dense consumers, else the short sequence."""
        if not state.reduced:
            return tokens
        if self.runtime.restores_now():
            return state.restore_sequence(tokens, self.runtime.owner.restore_mode)
        padded = isinstance(state, PaddedTokens)
        if self.runtime.last and isinstance(state, PackedTokens) and not padded:
            return unpack(tokens, state)
        return tokens
