"""What runs at the blocks of a model whose sequence gets shorter on the way.

Blocks ``y = x + f(x)`` reduce between attention and MLP: a pre-hook of the first module of ``f``
passes on the reduced tokens, a hook of its last module keeps the result aside and gives zeros to
the host's addition, and the block's own hook returns the sum. Position tables among a block's
arguments are cut down with the tokens; masks are, where attention is intercepted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from sparsiattn.attention import geometry
from sparsiattn.attention.layout import patch_grid
from sparsiattn.attention.packed import PackedTokens, pack, unpack
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import ReductionStep, TokenState, take
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.patching.discovery.blocks import Block, first_tensor
from sparsiattn.runtime.sdpa_intercept import THREAD
from sparsiattn.runtime.site_runtime import image_of, metered
from sparsiattn.strategies.base import AUTO_BLOCK, AUTO_TILE, TILE_FROM
from sparsiattn.strategies.token_base import Reduction, TokenInputs, TokenPlanner, TokenStrategy

Carried = TokenState | PackedTokens


class BlockRuntime:
    """One block of a model that carries fewer tokens: plain state that copies and pickles.

    place: where this block reduces (``"entry"``, ``"middle"``, its ``"exit"``, also where it has no
    tail, ``"bypass"`` where the grid must stay and only the MLP is spared), None if it does not.
    """

    def __init__(
        self, block: Block, site: Site, index: int, depth: int, owner: Any, class_tokens: int,
        strategy: TokenStrategy | None = None, planner: TokenPlanner | None = None,
        place: str | None = None,
    ) -> None:  # fmt: skip
        self.block, self.site, self.index, self.depth = block, site, index, depth
        self.owner, self.class_tokens = owner, class_tokens
        self.strategy, self.planner, self.place = strategy, planner, place
        self.first = self.last = False
        self.entered: dict[int, tuple[Any, Carried]] = {}
        self.inside: dict[int, tuple[Any, Carried]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entered": {}, "inside": {}}

    @property
    def asks(self) -> bool:
        """Whether the reduction reads this block's queries and keys."""
        return self.strategy is not None and self.strategy.reads_attention()

    def idle(self) -> bool:
        return self.owner.key in THREAD.disabled or not self.owner.alive

    def begin(self, x: Tensor) -> TokenState:
        prefix = self.site.prefix_tokens
        n = x.shape[1] - prefix if x.dim() == 3 else x.shape[1:-1].numel()
        grid = patch_grid(self.site.grid, n, self.site, image_of(self.owner))
        return TokenState(self.owner.key, prefix, grid, self.index)

    def recall(self, x: Tensor, token_state: Carried | None) -> Carried:
        """The stream that belongs to this input: the one at hand, or, when a checkpointed block
        runs again in the backward pass, the one that came with this very tensor."""
        if token_state is not None and (token_state.owner, token_state.layer) != (
            self.owner.key,
            self.index,
        ):
            token_state = None
        if token_state is not None and (torch.compiler.is_compiling() or token_state.given is x):
            return token_state
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
        noted = None if wrapped else self.entered.get(x.data_ptr())
        if noted is not None and noted[0]() is not None:
            refuse_lost_policy(self, noted[1])
            return noted[1]
        if token_state is not None:
            return self._changed(token_state, x)
        raise ModelChanged(
            f"block {self.block.name!r} ran on its own: which of its {x.shape[1]} tokens are left "
            f"is only known after block {self.index - 1}; run the whole model, or unpatch() first"
        )

    def _changed(self, token_state: Carried, x: Tensor) -> Carried:
        """The stream where something between two blocks handed on another tensor than was given."""
        if token_state.short is None:
            return token_state
        if isinstance(token_state, PackedTokens):
            raise ModelChanged(
                f"the input of block {self.block.name!r} was changed between blocks, while images "
                "with their own numbers of tokens are packed and features were asked for: use a "
                "fixed keep"
            )
        return replace(token_state, short=take(x, token_state.tokens()))

    def note(self, x: Tensor, token_state: Carried, inside: bool = False) -> None:
        """Keep the stream for a backward pass that runs this block, or only what is inside its
        forward, again from the same input."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or x.requires_grad):
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(x):  # checkpoints do not mix with those
            return
        table = self.inside if inside else self.entered
        for key in [key for key, (alive, _) in table.items() if alive() is None]:
            del table[key]
        # nothing kept may be ``x`` itself, or it would live as long as the table
        kept = replace(token_state, given=None, short=None if inside else token_state.short)
        table[x.data_ptr()] = (ref(x), kept)

    @metered
    def reduce(self, token_state: Carried, x: Tensor) -> tuple[Carried, Tensor]:
        """The sequence ``[B, N, C]`` after this block's reduction, prefix included."""
        remembers = self.owner.remembers()
        if isinstance(token_state, PackedTokens):
            return pack(
                [
                    apply(self.plan(one, part, attention), one, part, remembers)
                    for one, part, attention in token_state.parts(x, THREAD.asked)
                ]
            )
        reduction = self.plan(token_state, x, THREAD.asked)
        if reduction is None or reduction.mask is None:
            return apply(reduction, token_state, x, remembers)
        parts = [
            apply(part, token_state, x[i : i + 1], remembers)
            for i, part in enumerate(reduction.by_image())
        ]
        return pack(parts) if parts else (token_state, x)  # an empty batch has nothing to pack

    @metered
    def spare(self, token_state: TokenState, kept: Tensor) -> TokenState:
        """The stream after it was decided which of these tokens ``[B, P + n, C]`` skip the MLP."""
        reduction = self.plan(token_state, kept, None)
        if reduction is None:
            return token_state
        if reduction.policy is not None:
            return replace(token_state, policy=reduction.policy)
        if reduction.index is None:
            raise InvalidOption(
                f"block {self.block.name!r} must keep its grid, so every image has to spare the "
                "same number of tokens: use a fixed keep, e.g. keep=0.7"
            )
        return token_state.advance(
            ReductionStep(reduction.index, None, kept.shape[1] - token_state.prefix)
        )

    def plan(self, token_state: TokenState, x: Tensor, attention: Any) -> Reduction | None:
        assert self.planner is not None
        patches = x[:, token_state.prefix :]
        inputs = TokenInputs(
            patches, self.site, attention, self.index, self.depth, self.class_tokens, token_state.size,
            token_state.policy, self.owner.training, token_state.grid, token_state.ids,
        )  # fmt: skip
        return self.planner(inputs)


def apply(
    reduction: Reduction | None, token_state: TokenState, x: Tensor, remembers: bool
) -> tuple[TokenState, Tensor]:
    """Carry out a reduction on ``x`` ``[B, N, C]``, prefix included."""
    if reduction is None:
        return token_state, x
    if reduction.policy is not None:
        return replace(token_state, policy=reduction.policy), x
    if remembers:
        token_state = token_state.remember(x[:, token_state.prefix :])
    index, prefix = _index(reduction, x.device), token_state.prefix
    if reduction.assign is None and not token_state.reduced:
        index = _by_tiles(index, token_state)
    before = x.shape[1] - prefix
    # a mixed token stands for no patch alone, so it is written as a fused one
    at = -1 - index if reduction.mixed else index
    step = ReductionStep(at, reduction.assign, before, reduction.mixed, reduction.unfold)
    if reduction.values is not None:
        token_state = token_state.advance(step, reduction.size)
        return token_state, torch.cat([x[:, :prefix], reduction.values], dim=1)
    short = take(x, with_prefix(index, prefix))
    if reduction.added is not None:
        into, rows = reduction.added
        into = (into + prefix)[..., None].expand_as(rows)
        # in place: `short` was made just now, and nothing needs its former values for gradients
        short = short.scatter_add_(1, into, rows.to(short.dtype))
        return token_state.advance(step, reduction.size), short
    if reduction.fuse is None or index.shape[1] == before:
        return token_state.advance(step, reduction.size), short
    step, extra = fused(index, reduction.fuse, x[:, prefix:])
    return token_state.advance(step), torch.cat([short, extra], dim=1)


def _index(reduction: Reduction, device: torch.device) -> Tensor:
    """``[B, m]``: the tokens that stay."""
    if reduction.index is not None:
        return reduction.index
    assert reduction.mask is not None
    if device.type == "meta":  # a dry run cannot know: all of them
        return torch.arange(reduction.mask.shape[1], device=device)[None]
    return reduction.mask[0].nonzero().flatten()[None]


def _by_tiles(index: Tensor, token_state: TokenState) -> Tensor:
    """The tokens that stay, tile by tile where there are enough for attention in tiles: runs of the
    sequence are its tiles from here on, and later reductions keep the order."""
    if token_state.whole < TILE_FROM:
        return index
    rank = geometry.table(
        geometry.nested_rank, token_state.grid, AUTO_TILE, AUTO_BLOCK, device=index.device
    )
    return index.gather(1, rank[index].argsort(dim=1))


def fused(index: Tensor, weights: Tensor, x: Tensor) -> tuple[ReductionStep, Tensor]:
    """One more token ``[B, 1, C]``, the weighted sum of those that are dropped, weights as they are
    (EViT, section 3.2); it has the position of the heaviest."""
    left = weights.scatter(1, index, 0.0)
    extra = (left[:, None].to(x.dtype) @ x).to(x.dtype)
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    assign = torch.full_like(left, index.shape[1], dtype=torch.long).scatter(1, index, place)
    signed = torch.cat([index, -1 - left.argmax(1, keepdim=True)], dim=1)
    return ReductionStep(signed, assign, x.shape[1], fused=True), extra


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Rows of the sequence for these patch tokens and all prefix tokens, ``[B, P + m]``."""
    lead = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([lead, index + prefix], dim=1)


class EnterBlock:
    """Forward pre-hook of a block: hands it the short sequence and the position tables for it."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        runtime = self.runtime
        THREAD.asked = THREAD.pending = THREAD.branch = None
        THREAD.asks = runtime.asks
        if runtime.idle():
            THREAD.token_state = None
            return None
        x = first_tensor(args) if args else first_tensor(kwargs)
        assert x is not None
        token_state = runtime.begin(x) if runtime.first else runtime.recall(x, THREAD.token_state)
        runtime.note(x, token_state)
        short = x if token_state.short is None else token_state.short
        if runtime.place == "entry":
            token_state, short = runtime.reduce(token_state, short)
        THREAD.token_state = token_state
        runtime.note(short, token_state, inside=True)
        if not token_state.reduced:
            return None
        return _replaced(args, kwargs, x, short, token_state)


class ReopenBlock:
    """Forward pre-hook of the first module in a block: where only the block's forward is
    checkpointed (transformers), the backward pass runs it again without the block's own hooks."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any) -> None:
        runtime = self.runtime
        if torch.compiler.is_compiling() or not runtime.inside or runtime.idle():
            return
        slot = "spared" if runtime.place == "bypass" else "stream"
        token_state = getattr(THREAD, slot)
        if token_state is not None and token_state.layer == runtime.index:
            return
        noted = runtime.inside.get(args[0].data_ptr()) if args else None
        if noted is not None and noted[0]() is not None:
            setattr(THREAD, slot, noted[1])
            THREAD.asked = THREAD.pending = THREAD.branch = None
            THREAD.asks = runtime.asks


def _replaced(args: Any, kwargs: Any, x: Tensor, short: Tensor, token_state: Carried) -> Any:
    """The block's arguments with its input exchanged and its position tables cut down."""

    def fit(value: Any) -> Any:
        if value is x:
            return short
        if isinstance(value, Tensor):
            return token_state.fit_side(value)
        if isinstance(value, tuple):
            return tuple(fit(item) for item in value)
        return value

    return tuple(fit(a) for a in args), {name: fit(a) for name, a in kwargs.items()}


class EnterTail:
    """Forward pre-hook of the MLP branch's first module: passes on the reduced tokens."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any) -> Any:
        token_state = THREAD.token_state
        if (
            self.runtime.idle()
            or token_state is None
            or token_state.owner != self.runtime.owner.key
        ):
            return None
        x = args[0]
        token_state, short = self.runtime.reduce(token_state, x)
        THREAD.asked = None
        if short is x:
            THREAD.token_state = token_state
            return None
        THREAD.pending = (token_state, short)
        return (short, *args[1:])


class LeaveTail:
    """Forward hook of the MLP branch's last module: keeps its result for `LeaveBlock`."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        if THREAD.pending is None:
            return None
        THREAD.branch = output
        return output.new_zeros((1,) * output.dim())


class LeaveBlock:
    """Forward hook of a block: its output with fewer tokens, or with the original positions where
    somebody asks for those."""

    def __init__(self, runtime: BlockRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        runtime, token_state = self.runtime, THREAD.token_state
        if token_state is None or token_state.owner != runtime.owner.key or runtime.idle():
            return None
        host = first_tensor(output)
        assert host is not None
        out = host
        if THREAD.pending is not None:
            token_state, short = THREAD.pending
            refuse_reentrant(runtime, host, short)
            out = short + THREAD.branch
            THREAD.pending = THREAD.branch = None
        elif runtime.place == "exit":
            token_state, out = runtime.reduce(token_state, out)
        THREAD.asked = None
        given = self._given(token_state, out)
        short = None if given is out else out
        token_state = replace(token_state, layer=runtime.index + 1, short=short, given=given)
        THREAD.token_state = None if runtime.last else token_state
        if not torch.compiler.is_compiling():
            runtime.owner.carried = (token_state.bare(), out.shape[0])
        return None if given is host else with_first(output, host, given)

    def _given(self, token_state: Carried, out: Tensor) -> Tensor:
        """What the host gets: original positions for dense consumers, else the short sequence."""
        owner, last = self.runtime.owner, self.runtime.last
        if not token_state.reduced:
            return out
        if owner.restores_at(last):
            return token_state.whole_sequence(out, owner.restore_how)
        if last and isinstance(token_state, PackedTokens):
            return unpack(out, token_state)
        return out


def refuse_lost_policy(runtime: BlockRuntime, token_state: Carried) -> None:
    """A policy drawn in a reentrant checkpoint reaches later blocks without its gradient."""
    policy = token_state.policy if isinstance(token_state, TokenState) else None
    if policy is not None and torch.is_grad_enabled() and not policy.requires_grad:
        raise ModelChanged(
            f"block {runtime.block.name!r} is checkpointed with use_reentrant=True, which would "
            "lose the gradient of learned token scores: checkpoint with use_reentrant=False"
        )


def refuse_reentrant(runtime: BlockRuntime, host: Tensor, short: Tensor) -> None:
    """Tokens that leave a reentrant checkpoint past its output would get no gradient."""
    if torch.is_grad_enabled() and host.requires_grad and not short.requires_grad:
        raise ModelChanged(
            f"block {runtime.block.name!r} checkpoints its own forward with use_reentrant=True, "
            "which would lose the gradient of reduced tokens: enable gradient checkpointing with "
            "use_reentrant=False"
        )


def with_first(output: Any, old: Tensor, new: Tensor) -> Any:
    """A block's output (a tensor, or a tuple that starts with one) with that tensor exchanged."""
    if isinstance(output, Tensor):
        return new
    return type(output)(new if item is old else item for item in output)
