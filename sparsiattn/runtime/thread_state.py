"""Thread-local state of a running forward pass, one record for each lifetime.

Dynamo follows attributes that are set on `threading.local` objects, also inside checkpoints; it
follows neither context variables nor class defaults. Each record is therefore such an object, and
its dataclass ``__init__`` sets every attribute on the instance in each new thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import HostCall
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.packing import Packing
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.token_state import TokenState
from sparsiattn.runtime.open_call import NestedCall, OpenCall

Route: TypeAlias = Callable[[HostCall], Tensor]
"""A function that computes a site's call of scaled dot product attention."""
Scope: TypeAlias = tuple[Route | None, int, Any]
"""An open scope: its route (None for the host's own attention), its key, and the outer scope."""
Carried: TypeAlias = TokenState | PackedTokens
"""State of the tokens that blocks pass on, with equal or with different counts per image."""


def _without_class_defaults(cls: type) -> None:
    # Dynamo of torch 2.10 guards the class attribute and ignores the value of the instance
    for name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
        if name in vars(cls):
            delattr(cls, name)


@dataclass(eq=False)
class SiteCalls(threading.local):
    """From the entry of an attention module to its exit; owned by the site's two hooks.

    Attributes:
        top: The innermost open scope. Scopes are a linked list of functions and numbers, as
            torch.compile together with gradient checkpointing cannot trace other objects.
        callers: By key of a scope, the call that opened it; see `abandoned`.
        routed: Keys of the open scopes whose module has called attention.
        shared: The pattern of the first of two calls that must use the same keys; in a padded
            batch, patterns by number of own tokens.
        deferred: Whether attention is being called for deferred scores of the scope's module. Their
            values may be needed inside another module, as in a dropout or a hook.
        offset: How many tokens of a sequence of several images the running site has attended to.
        offset: How many tokens of a sequence of several images the innermost such site has attended
            to.
    """

    # without an instance dictionary: Dynamo would write into it, and another frame that is compiled
    # separately would not find the scope that a compiled hook opened
    __slots__ = ()

    top: Scope | None = None
    callers: dict[int, OpenCall | NestedCall] = field(default_factory=dict)
    routed: set[int] = field(default_factory=set)
    shared: Pattern | dict[int, Pattern] | None = None
    deferred: bool = False
    offset: int = 0


@dataclass(eq=False)
class BlockCall(threading.local):
    """From the entry of a block to the entry of the next; owned by the block's hooks.

    Attributes:
        token_state: The tokens that the sequence still contains.
        bypass_state: The same for blocks that keep their grid, where dropped tokens skip the MLP.
        restoring: Whether every block of this pass restores original positions.
        wants_attention: Whether the block's reduction reads its queries and keys.
        attention: Those queries and keys, after attention ran; one record per packed image.
        windows: The windows on which the block runs, if others skip it (`ChosenWindows` in
            `window_skip`).
        mlp_input: The token state and the tokens that the MLP branch got.
        mlp_output: The output of the MLP branch, withheld from the host's own addition.
        masked: Whether attention got a mask that the model did not pass at patch time, or a mask
            that hides padding.
    """

    token_state: Carried | None = None
    bypass_state: TokenState | None = None
    restoring: bool = False
    wants_attention: bool = False
    attention: AttentionInputs | list[AttentionInputs] | None = None
    windows: Any = None
    mlp_input: tuple[Carried, Tensor] | None = None
    mlp_output: Tensor | None = None
    masked: bool = False

    def begin(self, wants_attention: bool) -> None:
        """Reset for a new block."""
        self.attention = self.mlp_input = self.mlp_output = None
        self.wants_attention = wants_attention
        self.masked = False


@dataclass(eq=False)
class ModelCall(threading.local):
    """From the entry of a patched model to its exit.

    Attributes:
        inside: Keys of the patches whose model is running.
        features: Keys of the patches whose caller needs the original token positions.
        image: Key of a patch, and the height and width of its current image in patches.
        packing: Key of a patch, and the sizes of the images in its current sequence.
        cross_layer: State that sites of this forward pass stored for later ones.
    """

    inside: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    image: tuple[int, int, int] | None = None
    packing: tuple[int, Packing] | None = None
    cross_layer: CrossLayerState | None = None


for _record in (SiteCalls, BlockCall, ModelCall):
    _without_class_defaults(_record)

SITE_CALLS = SiteCalls()
BLOCK_CALL = BlockCall()
MODEL_CALL = ModelCall()


def in_backward() -> bool:
    """Whether a backward pass is running, so that this is the recomputation of a checkpoint."""
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() >= 0)


def forget_models(keys: Collection[int]) -> None:
    """Note that the models of these patches have stopped running."""
    MODEL_CALL.inside = tuple(key for key in MODEL_CALL.inside if key not in keys)
    MODEL_CALL.features = tuple(key for key in MODEL_CALL.features if key not in keys)


def forget_pass() -> None:
    """Drop the state that hooks of one forward pass exchange."""
    BLOCK_CALL.token_state = BLOCK_CALL.bypass_state = BLOCK_CALL.windows = None
    BLOCK_CALL.attention = BLOCK_CALL.mlp_input = BLOCK_CALL.mlp_output = None
    MODEL_CALL.cross_layer = None
