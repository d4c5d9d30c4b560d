"""`PatchOwner`: what sites and blocks need to know of the patch they belong to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import Maps
from sparsiattn.attention.packing import Packing
from sparsiattn.runtime import settings
from sparsiattn.runtime.open_call import OpenCall
from sparsiattn.runtime.thread_state import BLOCK_CALL, MODEL_CALL, Carried, in_backward
from sparsiattn.strategies.token_base import TokenStrategy

_KEYS = itertools.count(1)


def new_key() -> int:
    """A number that is unique among the patches and sites of this process."""
    return next(_KEYS)


_LAST_PASSES: ContextVar[Mapping[PatchOwner, list[tuple[Carried, int] | None]]] = ContextVar(
    "sparsiattn_last_passes"
)
"""The last pass of each patch. Keys are weak references, and values end with their context."""


class PatchOwner:
    """The part of a patch that its sites and blocks read and write while the model runs.

    Attributes:
        model: The patched model.
        key: Number of this patch in this process; a copy gets its own.
        alive: False after `unpatch`. An interrupt can leave a scope open longer than that.
        image: Rows and columns of the last feature map that tokens were made of, for a backward
            pass that recomputes blocks in another thread.
        packing: Sizes of the images of the last sequence of several, for the same.
        map_size: Rows and columns of that map at patch time.
        tokens: The token strategy; None if there is none.
        proportional: Whether attention weights merged tokens by their size.
        parameters: Names of the parameters of the model's forward.
        defaults: Defaults of those parameters.
        known_calls: By `call_key`, whether a call needs all positions where blocks would not
            restore them anyway.
        other_models: Class names of other models that share modules with this one and have run
            them; the modules run dense there.
        reads_prefix: Whether the model's head reads only prefix tokens.
        parts: Cache of the model's modules.
        running: By thread, the call of the model that is running there.
        leave_hook: Handle of the hook at the end of a pass.
        active_monitor: The running `Monitor`, see `Patch.monitor`; None if there is none.
        monitored: By thread, the monitor and the setting of the pass that it watches there.
        went_dense: Whether a monitor made the patch run dense.
    """

    def __init__(self, model: nn.Module, map_size: Grid) -> None:
        self.model, self.map_size = model, map_size
        self.key = new_key()
        self.alive = True
        self.image: Grid | None = None
        self.packing: Packing | None = None
        self.tokens: TokenStrategy | None = None
        self.proportional = False
        self.reads_prefix = False
        self.running: dict[int, OpenCall] = {}
        self.leave_hook: Any = None
        self.active_monitor: Any = None
        self.monitored: dict[int, tuple[Any, Any]] = {}
        self.went_dense = False
        self.parameters: tuple[str, ...] = ()
        self.defaults: dict[str, Any] = {}
        self.known_calls: dict[tuple[Any, ...], bool] = {}
        self.other_models: set[str] = set()
        self.parts: set[ref[nn.Module]] = set()

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    @property
    def disabled_here(self) -> bool:
        """Whether this thread is inside `Patch.disabled`, or a monitor made the patch dense."""
        if self.went_dense and self._runs_dense():
            return True
        return settings.are_set() and self.key in settings.disabled

    def _runs_dense(self) -> bool:
        """Whether a monitor's switch to dense applies here; a running pass keeps its state."""
        if torch.compiler.is_compiling():
            return not self.training
        if self.training or self.is_examined:
            return False
        return self.key not in MODEL_CALL.inside

    @property
    def is_examined(self) -> bool:
        """Whether calls are recorded, counted or warmed up in this context."""
        if not settings.are_set():
            return False
        examiners = settings.observer, settings.warming, settings.meter
        return any(examiner is not None for examiner in examiners)

    @property
    def last_pass(self) -> tuple[Carried, int] | None:
        """Tokens and batch size at the end of the last eager forward pass of this thread or task.

        The recomputation of a checkpoint does not count as a forward pass.
        """
        record = _LAST_PASSES.get({}).get(self)
        return None if record is None else record[0]

    @last_pass.setter
    def last_pass(self, value: tuple[Carried, int] | None) -> None:
        if in_backward() or (value is None and self not in _LAST_PASSES.get({})):
            return
        passes = WeakKeyDictionary(_LAST_PASSES.get({}))  # a copy, as contexts share the original
        passes[self] = [value]
        _LAST_PASSES.set(passes)

    def note_block(self, value: tuple[Carried, int]) -> None:
        """Set `last_pass` after a block; within a pass, update the existing record in place."""
        record = _LAST_PASSES.get({}).get(self)
        if record is None or self.key not in MODEL_CALL.inside:
            self.last_pass = value
        elif not in_backward():
            record[0] = value

    @property
    def shortens(self) -> bool:
        """Whether sequences get shorter on their way through the model."""
        return False

    def call_needs_all(self, args: Any, kwargs: Any) -> bool:
        """Whether a call whose `call_key` is not known yet needs all positions."""
        return True

    def restores_from(self, index: int) -> bool:
        """Whether this block or a later one restores original positions."""
        return BLOCK_CALL.restoring

    @property
    def restore_mode(self) -> Literal["scatter", "unfold"]:
        """How original positions are restored; see `TokenState.restore_patches`."""
        scatters = self.tokens is not None and self.tokens.restore == "scatter"
        return "scatter" if scatters else "unfold"

    def maps(self) -> Maps | None:
        """Size of the feature map that tokens are made of, in this thread's current forward pass.

        Returns:
            The size in this pass and the size at patch time; None if the size is not known.
        """
        image = MODEL_CALL.image
        now = image[1:] if image is not None and image[0] == self.key else self.image
        return None if now is None else (now, self.map_size)

    def packing_here(self) -> Packing | None:
        """Sizes of the images in the current sequence of this thread's forward pass.

        None if they are not known: in a compiled model, and in parts of it that run on their own.
        """
        noted = MODEL_CALL.packing
        if noted is not None and noted[0] == self.key:
            return noted[1]
        return self.packing if in_backward() else None
