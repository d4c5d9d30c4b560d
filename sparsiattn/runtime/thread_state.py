"""State of a running forward pass, one record for each life time, in every thread its own.

Dynamo follows attributes that are set on `threading.local` objects, also inside checkpoints; it
follows neither context variables nor class defaults. So each record is such an object, and its
dataclass ``__init__`` sets every attribute on the instance in each new thread.
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
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.token_state import TokenState
from sparsiattn.runtime.open_call import NestedCall, OpenCall

Route: TypeAlias = Callable[[HostCall], Tensor]
"""What stands in for a site's call of scaled dot product attention."""
Scope: TypeAlias = tuple[Route | None, int, Any]
"""An open site: its route (None for the host's own attention), its key, the scope around it."""
Carried: TypeAlias = TokenState | PackedTokens
"""The tokens that blocks hand on, of images alike or each with its own count."""


def _without_class_defaults(cls: type) -> None:
    # Dynamo of torch 2.10 guards the class attribute and misses what the instance is set to
    for name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
        if name in vars(cls):
            delattr(cls, name)


@dataclass(eq=False)
class SiteCalls(threading.local):
    """From the entry of an attention module to its exit; owned by the site's two hooks.

    Attributes:
        top: The innermost open scope, a linked list of functions and numbers only: what
            torch.compile together with gradient checkpointing can follow.
        callers: Who called the hook that opened a scope, by its key; see `abandoned`.
        routed: Keys of the open scopes whose module did call attention.
        shared: The pattern of the first of two calls that must agree on their keys; by number of
            own tokens in a padded batch.
        deferred: Whether attention is called for scores that the open scope's module put off: their
            values may be needed inside another module, as in a dropout or a hook.
    """

    # without a dictionary of its own: Dynamo would write into that, and another frame, compiled by
    # itself, would not find the scope that a compiled hook opened
    __slots__ = ()

    top: Scope | None = None
    callers: dict[int, OpenCall | NestedCall] = field(default_factory=dict)
    routed: set[int] = field(default_factory=set)
    shared: Pattern | dict[int, Pattern] | None = None
    deferred: bool = False


@dataclass(eq=False)
class BlockCall(threading.local):
    """From the entry of a block to the entry of the next; owned by the block's hooks.

    Attributes:
        token_state: Which tokens the sequence still carries.
        bypass_state: The same where the grid stays and dropped tokens skip the MLP only.
        restoring: Whether every block of this pass gives original positions back.
        wants_attention: Whether the block's reduction reads its queries and keys.
        attention: Those, once attention ran; one record per image for packed images.
        windows: The windows on which the block runs, where others pass through unchanged
            (`ChosenWindows` in `window_skip`).
        mlp_input: The token state and the tokens that the MLP branch took.
        mlp_output: What the MLP branch returned, kept from the host's own addition.
        masked: Whether attention got a mask that the model was not seen to give at patch time, or
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
        """Forget the block before."""
        self.attention = self.mlp_input = self.mlp_output = None
        self.wants_attention = wants_attention
        self.masked = False


@dataclass(eq=False)
class ModelCall(threading.local):
    """From the entry of a patched model to its exit.

    Attributes:
        inside: Keys of the patches whose model runs.
        features: Keys of those whose caller wants the original token positions.
        image: Key of a patch, and the height and width of its present image in patches.
        cross_layer: What sites of this forward pass left for later ones.
    """

    inside: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    image: tuple[int, int, int] | None = None
    cross_layer: CrossLayerState | None = None


for _record in (SiteCalls, BlockCall, ModelCall):
    _without_class_defaults(_record)

SITE_CALLS = SiteCalls()
BLOCK_CALL = BlockCall()
MODEL_CALL = ModelCall()


def in_backward() -> bool:
    """Whether a backward pass runs, and so a checkpoint runs code again."""
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() >= 0)


def forget_models(keys: Collection[int]) -> None:
    """The models of these patches run no more."""
    MODEL_CALL.inside = tuple(key for key in MODEL_CALL.inside if key not in keys)
    MODEL_CALL.features = tuple(key for key in MODEL_CALL.features if key not in keys)


def forget_pass() -> None:
    """Drop what hooks of one forward pass hand each other."""
    BLOCK_CALL.token_state = BLOCK_CALL.bypass_state = BLOCK_CALL.windows = None
    BLOCK_CALL.attention = BLOCK_CALL.mlp_input = BLOCK_CALL.mlp_output = None
    MODEL_CALL.cross_layer = None
