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
from sparsiattn.runtime import settings
from sparsiattn.runtime.open_call import OpenCall
from sparsiattn.runtime.thread_state import BLOCK_CALL, MODEL_CALL, Carried, in_backward
from sparsiattn.strategies.token_base import TokenStrategy

_KEYS = itertools.count(1)


def new_key() -> int:
    """A number that no other patch or site of this process has."""
    return next(_KEYS)


_LAST_PASSES: ContextVar[Mapping[PatchOwner, list[tuple[Carried, int] | None]]] = ContextVar(
    "sparsiattn_last_passes"
)
"""By patch, which the keys do not keep alive; contexts that end take theirs with them."""


class PatchOwner:
    """The part of a patch that its sites and blocks read and write while the model runs.

    Attributes:
        model: The patched model.
        key: Number of this patch in this process; a copy gets its own.
        alive: False from `unpatch` on. An interrupt can leave a scope open beyond that.
        image: Rows and columns of the last map that tokens were made of, for a backward pass that
            runs blocks again in another thread.
        map_size: Its rows and columns at patch time.
        tokens: The token strategy, if there is one.
        proportional: Whether merged tokens weigh by their size in attention.
        parameters: Names of what the model's forward takes.
        defaults: Their defaults.
        known_calls: Ways of calling the model (see `call_key`), and whether a way needs every
            position where blocks do not give them back anyway.
        other_models: Classes of models that share parts with this one and were seen to run them;
            there they run dense.
        reads_prefix: Whether the model's head reads prefix tokens alone.
        parts: The model's modules, as they were when last looked through.
        running: By thread, the call of the model that began there and has not ended.
        leave_hook: Handle of the hook at the end of a pass.
        active_monitor: What watches the patch in use, see `Patch.monitor`; None for nothing.
        monitored: By thread, the monitor and the setting of the pass that it watches there.
        went_dense: Whether a monitor made it run dense.
    """

    def __init__(self, model: nn.Module, map_size: Grid) -> None:
        self.model, self.map_size = model, map_size
        self.key = new_key()
        self.alive = True
        self.image: Grid | None = None
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
        """Whether what a monitor decided holds here; within a pass, what held at its entry does."""
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
        """Tokens and batch size at the end of this thread's, or task's, last eager forward pass.

        What a checkpoint runs again is no forward pass.
        """
        passed = _LAST_PASSES.get({}).get(self)
        return None if passed is None else passed[0]

    @last_pass.setter
    def last_pass(self, value: tuple[Carried, int] | None) -> None:
        if in_backward() or (value is None and self not in _LAST_PASSES.get({})):
            return
        passes = WeakKeyDictionary(_LAST_PASSES.get({}))  # a new one: contexts are handed on
        passes[self] = [value]
        _LAST_PASSES.set(passes)

    def note_block(self, value: tuple[Carried, int]) -> None:
        """Set `last_pass` behind a block; within a pass, whose entry made a record, in place."""
        passed = _LAST_PASSES.get({}).get(self)
        if passed is None or self.key not in MODEL_CALL.inside:
            self.last_pass = value
        elif not in_backward():
            passed[0] = value

    @property
    def shortens(self) -> bool:
        """Whether sequences get shorter on their way through the model."""
        return False

    def call_needs_all(self, args: Any, kwargs: Any) -> bool:
        """Whether a call in a way that is not known yet needs every position."""
        return True

    def restores_from(self, index: int) -> bool:
        """Whether a block gives original positions back, this one or one behind it."""
        return BLOCK_CALL.restoring

    @property
    def restore_mode(self) -> Literal["scatter", "unfold"]:
        """How original positions come back; see `TokenState.restore_patches`."""
        scatters = self.tokens is not None and self.tokens.restore == "scatter"
        return "scatter" if scatters else "unfold"

    def maps(self) -> Maps | None:
        """Sizes of the map that the tokens of this thread's present forward pass are made of."""
        image = MODEL_CALL.image
        now = image[1:] if image is not None and image[0] == self.key else self.image
        return None if now is None else (now, self.map_size)
