"""Blocks where the grid must stay, as in windows and stages: dropped tokens skip the MLP alone
(DynamicViT's extension to Swin), and the hooks of every block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from sparsiattn.attention.token_state import take
from sparsiattn.patching.discovery.blocks import first_tensor
from sparsiattn.runtime.block_runtime import (
    BlockRuntime,
    EnterBlock,
    EnterTail,
    LeaveBlock,
    LeaveTail,
    ReopenBlock,
    refuse_reentrant,
    with_first,
)
from sparsiattn.runtime.sdpa_intercept import THREAD


class EnterSpared:
    """Forward pre-hook of a block where the grid must stay: which tokens skip its MLP."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        runtime = self.runtime
        THREAD.pending = THREAD.branch = None
        if runtime.idle():
            THREAD.spared = None
            return
        x = first_tensor(args) if args else first_tensor(kwargs)
        assert x is not None
        token_state = runtime.begin(x) if runtime.first else runtime.recall(x, THREAD.spared)
        runtime.note(x, token_state)
        runtime.note(x, token_state, inside=True)
        THREAD.spared = token_state


class EnterBypass:
    """Forward pre-hook of the MLP branch where the grid must stay: only kept tokens take it."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any) -> Any:
        runtime, token_state = self.runtime, THREAD.spared
        if runtime.idle() or token_state is None or token_state.owner != runtime.owner.key:
            return None
        x = args[0]
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if runtime.planner is not None:
            kept = take(tokens, token_state.tokens()) if token_state.reduced else tokens
            token_state = THREAD.spared = runtime.spare(token_state, kept)
        if token_state.policy is None and not token_state.reduced:
            return None
        short = take(tokens, token_state.tokens()) if token_state.reduced else x
        THREAD.pending = (token_state, short)
        return (short, *args[1:])


class LeaveBypass:
    """Forward hook of the block: adds the MLP's result to the tokens that took it."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        runtime, token_state = self.runtime, THREAD.spared
        if runtime.idle() or token_state is None or token_state.owner != runtime.owner.key:
            return None
        host = first_tensor(output)
        assert host is not None
        if THREAD.pending is None:
            THREAD.spared = replace(token_state, layer=runtime.index + 1, given=host)
            return None
        (token_state, short), branch = THREAD.pending, THREAD.branch
        THREAD.pending = THREAD.branch = None
        refuse_reentrant(runtime, host, short)
        flat = host.reshape(host.shape[0], -1, host.shape[-1])
        if token_state.policy is not None:
            policy = nn.functional.pad(token_state.policy, (token_state.prefix, 0), value=1.0)
            out = flat + branch.reshape(flat.shape) * policy[..., None].to(branch.dtype)
        else:
            index = token_state.tokens()[..., None].expand(-1, -1, flat.shape[-1])
            out = flat.scatter_add(1, index, branch.to(flat.dtype))
        out = out.view(host.shape)
        THREAD.spared = replace(token_state, layer=runtime.index + 1, given=out)
        return with_first(output, host, out)


def hook_block(model: nn.Module, runtime: BlockRuntime) -> list[Any]:
    """The hooks of one block. They come first, so that others see the sequence as it goes on."""
    module, tail = model.get_submodule(runtime.block.name), runtime.block.tail
    bypass = runtime.place == "bypass"
    begin = EnterSpared(runtime) if bypass else EnterBlock(runtime)
    leave = LeaveBypass(runtime) if bypass else LeaveBlock(runtime)
    hooks = [
        module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
        module.register_forward_hook(leave, prepend=True),
    ]
    if runtime.block.head is not None:
        head = model.get_submodule(runtime.block.head)
        hooks.append(head.register_forward_pre_hook(ReopenBlock(runtime)))
    if tail is not None and runtime.place in ("middle", "bypass"):
        enter = EnterBypass(runtime) if bypass else EnterTail(runtime)
        entry, last = model.get_submodule(tail.entry), model.get_submodule(tail.exit)
        hooks.append(entry.register_forward_pre_hook(enter))
        hooks.append(last.register_forward_hook(LeaveTail()))
    return hooks
