"""The handle of a patch: it owns everything that was changed, and undoes it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType, ModelChanged
from sparsiattn.kernels import cost
from sparsiattn.patching.discovery.backbone import AttributeOverride, Backbone
from sparsiattn.patching.storing import Storable
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.cross_layer import NoteEntry, enclosing
from sparsiattn.runtime.lifting import drop, lift
from sparsiattn.runtime.mlp_bypass import hook_block
from sparsiattn.runtime.multihead import RefuseWeights, swap, swap_back
from sparsiattn.runtime.restore import METHODS, EnterModel, LeaveModel, unwatch, watch
from sparsiattn.runtime.sdpa_intercept import THREAD, forget_compiled, install
from sparsiattn.runtime.site_runtime import (
    PLANNER,
    CloseScope,
    Observer,
    OpenScope,
    SiteRuntime,
    WatchImage,
)
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.token_base import TokenStrategy

if TYPE_CHECKING:
    from sparsiattn.patching.report import Report

MARK = "_sparsiattn_patch"
_OWNERS = itertools.count(1)
_SWITCHING = threading.RLock()


class Patch(Storable):
    """A live patch of one model: made by `patch`, found again by `patch_of`.

    strategy, kernel: as `patch` was told. backbone: the adapter. input_shape: of the dry run. left:
    ``(name, reason)`` of attention that was not patched. As a context manager it undoes itself on
    exit.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
    ...     patch.report().sites[0].density < 0.3
    True
    """

    def __init__(
        self, model: nn.Module, strategy: Config, kernel: str, backbone: Backbone,
        input_shape: tuple[int, ...], left: Sequence[tuple[str, str]],
    ) -> None:  # fmt: skip
        self.model, self.strategy, self.kernel = model, strategy, kernel
        self.backbone, self.input_shape, self.skipped = backbone.name, input_shape, tuple(left)
        self.found: tuple[Site, ...] = ()
        self.unread: frozenset[str] = frozenset()  # sites whose attention weights nothing reads
        self.lifted: frozenset[str] = frozenset()  # sites that write their softmax by hand
        self.runtimes: list[SiteRuntime] = []
        self.edits: list[AttributeOverride] = []
        self.image: tuple[int, int] | None = None
        self.patch_size = backbone.patch_size(model)
        self.follows_model = True
        self.tokens: TokenStrategy | None = None
        self.blocks: list[BlockRuntime] = []
        self.proportional = False
        self.restores_last = False
        self.carried: Any = None
        self.alive = True
        self._reapply = False
        self.key = next(_OWNERS)
        self._handles: list[Any] = []
        self._places: list[tuple[tuple[str, ...], nn.Module]] = []
        self._paused = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, carried=None)
        self.key = next(_OWNERS)  # a copy is disabled on its own
        # made inside disabled(): the host's switches are turned again at the first forward
        self._reapply, self._paused = bool(self._paused), 0

    @property
    def active(self) -> bool:
        """Whether the model still carries this patch."""
        return vars(self.model).get(MARK) is self

    @property
    def sites(self) -> list[Site]:
        return [runtime.site for runtime in self.runtimes]

    @property
    def learns(self) -> bool:
        """Whether `calibrate` has planners to fit here."""
        return any(isinstance(runtime.planner, LearnedPlanner) for runtime in self.runtimes)

    @property
    def training(self) -> bool:
        return self.model.training

    def restores_at(self, last: bool) -> bool:
        """Whether a block's output gets its original positions back in the present forward."""
        return self.key in THREAD.features or (last and self.restores_last)

    def remembers(self) -> bool:
        """Whether the last values of dropped tokens are needed in the present forward."""
        return self.restores_at(last=True)

    @property
    def restore_how(self) -> str:
        return (
            "scatter" if self.tokens is not None and self.tokens.restore == "scatter" else "unfold"
        )

    def source(self) -> torch.Tensor:
        """Where every original token is in the final sequence of the last eager forward pass.

        Returns ``[B, N]`` (prefix tokens first, then patches in raster order) with positions in
        the final sequence: a merged or fused token has that of its cluster, a dropped one -1.
        """
        from sparsiattn.attention.packed import source

        self._require_active("source")
        if not self.blocks or self.blocks[0].place == "bypass":
            raise InvalidOption(
                "source() needs a token strategy that makes the sequence shorter; here every token "
                "stays in its place"
            )
        if self.carried is None:
            raise InvalidOption(
                "source() speaks of the last forward pass: run the model first (eagerly, and not "
                "disabled: compiled graphs and copies keep no record)"
            )
        return source(*self.carried)

    def check_sites(self) -> None:
        """Raise `ModelChanged` if a patched module or one that holds it is gone or another."""
        for path, module in self._places:
            found: nn.Module | None = self.model
            for name in path:
                found = None if found is None else found._modules.get(name)
            if found is not module:
                raise ModelChanged(
                    f"site {'.'.join(path)!r} is no longer the module that was patched "
                    f"(a {type(module).__name__} was replaced or deleted); call unpatch() and "
                    "patch the changed model again"
                )

    def unpatch(self) -> nn.Module:
        """Undo everything; the model is bit for bit what it was. Calling it twice is no error."""
        if self.active:
            _remove(self)
            forget_compiled()
        return self.model

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The host's own path inside the block, bit-equal to the unpatched model, in this thread.

        Switches of the model itself (``fused_attn``) are turned back as well, for all threads. With
        gradient checkpointing, run the backward pass inside the block too. Only
        `nn.TransformerEncoderLayer`, which leaves its fused path wherever a hook hangs, can differ
        by rounding.
        """
        before = THREAD.disabled
        THREAD.disabled = (*before, self.key)
        self._pause(+1)
        try:
            yield self.model
        finally:
            self._pause(-1)
            THREAD.disabled = before

    def _pause(self, step: int) -> None:
        with _SWITCHING:
            was, self._paused = self._paused, self._paused + step
            if self.active and bool(was) != bool(self._paused):
                for edit in self.edits:
                    edit.revert() if self._paused else edit.apply()

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[nn.Module]:
        """Dense attention inside the block, every site's `AttentionInputs` handed to a function.

        ``observer(site, planner, inputs)`` runs before the host's attention; it is how planners
        are fitted and attention is measured or drawn although it runs fused.
        """
        if THREAD.observer is not None:
            raise InvalidOption("this thread is observing a patch already; leave that block first")
        THREAD.observer = (self.key, observer)
        try:
            yield self.model
        finally:
            THREAD.observer = None

    def report(self) -> Report:
        """Sites, kernels, density, MACs before and after, and why anything was left alone."""
        from sparsiattn.patching.report import report

        self._require_active("report")
        return report(self)

    def warmup(self, input: Any) -> Patch:
        """Run the model once so that kernels that compile do so now, not in a later forward pass.

        input: what the model takes: images ``[B, C, H, W]``, a dict of keyword arguments or a tuple
        of positional ones, of the shape, type and device (and under the autocast) of later calls.
        The model runs in the mode it is in, without gradients; while it trains on a GPU, backward
        passes of the kernels are compiled as well. Weights, buffers, planners and random numbers
        stay as they are. Returns the patch.

        >>> import torch, sparsiattn
        >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
        >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
        ...     patch.warmup(tiny_images(2)) is patch
        True
        """
        from sparsiattn.patching.warmup import warmup

        self._require_active("warmup")
        warmup(self, input)
        return self

    def _require_active(self, what: str) -> None:
        if not self.active:
            raise ModelChanged(f"{what}() needs a live patch, but this one was undone")
        self.check_sites()
        from sparsiattn.patching.apply import refresh

        refresh(self)

    def before_forward(self) -> None:
        """Called by the model's own pre-hook."""
        self.check_sites()
        if self._reapply:
            for edit in self.edits:
                edit.apply()
            self._reapply = False

    def __repr__(self) -> str:
        state = "" if self.active else " (undone)"
        return (
            f"<Patch{state}: {self.strategy.name} on {len(self.runtimes)} sites of "
            f"{type(self.model).__name__}, kernel={self.kernel!r}>"
        )


def patch_of(model: nn.Module) -> Patch | None:
    """The live patch of a model (or of its copy, or after unpickling), None if there is none.

    >>> patch_of(torch.nn.Linear(1, 1)) is None
    True
    """
    return vars(unwrap(model)).get(MARK)


def unpatch(model: nn.Module) -> nn.Module:
    """Undo the model's patch, if it has one; returns the model.

    >>> unpatch(torch.nn.Linear(1, 1))
    Linear(in_features=1, out_features=1, bias=True)
    """
    live = patch_of(model)
    if live is not None:
        live.unpatch()
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel or DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise InvalidType(f"a torch.nn.Module is needed, got {type(model).__name__}")
    while True:
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        name = "module" if isinstance(model, parallel) else "_orig_mod"
        inner = model._modules.get(name)
        if inner is None:
            return model
        model = inner


def attach(handle: Patch) -> None:
    """Change the model; a fault on the way is undone before it is raised."""
    install()
    for device in {parameter.device for parameter in handle.model.parameters()}:
        cost.ready(device)
    try:
        handle.model.__dict__[MARK] = handle
        adapter = REGISTRY.get("backbones", handle.backbone)
        handle.edits = adapter.attribute_overrides(handle.model)
        for edit in handle.edits:
            edit.apply()
        for runtime in handle.runtimes:
            _add_planner(handle, runtime)
        for module in feature_modules(handle):
            watch(module, handle)
        hook_up(handle, adapter)
    except BaseException:
        _remove(handle)
        raise
    forget_compiled()


def hook_up(handle: Patch, adapter: Backbone) -> None:
    """Register every hook."""
    image, model = adapter.image_module(handle.model), handle.model
    hooks = handle._handles
    hooks.append(image.register_forward_pre_hook(WatchImage(handle), with_kwargs=True))
    # before the sites': the model itself may be one
    hooks.append(model.register_forward_pre_hook(EnterModel(handle), with_kwargs=True))
    if handle.blocks:
        hooks.append(model.register_forward_hook(LeaveModel(handle), always_call=True))
    carrying = [runtime for runtime in handle.runtimes if runtime.strategy.uses_cross_layer_state]
    for module in enclosing(model, [runtime.site for runtime in carrying]):
        hooks.append(module.register_forward_pre_hook(NoteEntry(handle), with_kwargs=True))
    for runtime in handle.runtimes:
        _hook_site(handle, runtime)
    for block in handle.blocks:
        hooks.extend(hook_block(handle.model, block))
        tail = block.block.tail
        for name in () if tail is None else (tail.entry, tail.exit):
            handle._places.append((tuple(name.split(".")), model.get_submodule(name)))


def feature_modules(handle: Patch) -> list[nn.Module]:
    """The model, and every part of it with methods that return features, where sequences get
    shorter."""
    if not handle.blocks or handle.blocks[0].place == "bypass":
        return []
    return [
        module
        for module in handle.model.modules()
        if module is handle.model
        or any(hasattr(type(module), name) for name in METHODS)
        or hasattr(type(module), "main_input_name")  # a transformers model inside another
    ]


def _add_planner(handle: Patch, runtime: SiteRuntime) -> None:
    name = runtime.site.name
    module = handle.model.get_submodule(name)
    if isinstance(runtime.planner, nn.Module):
        if PLANNER in module._modules or hasattr(module, PLANNER):
            raise InvalidOption(f"{runtime.site.name} already has a member named {PLANNER!r}")
        module.add_module(PLANNER, runtime.planner)


def _hook_site(handle: Patch, runtime: SiteRuntime) -> None:
    name = runtime.site.name
    module = handle.model.get_submodule(name)
    handle._places.append((tuple(name.split(".")) if name else (), module))
    if swap(module) and name not in handle.unread:
        refuse = RefuseWeights(handle, name)
        handle._handles.append(module.register_forward_pre_hook(refuse, with_kwargs=True))
    if name in handle.lifted:
        lift(module)
    opener = OpenScope(runtime)
    handle._handles.append(module.register_forward_pre_hook(opener))
    closer = CloseScope(opener)
    handle._handles.append(module.register_forward_hook(closer, always_call=True))


def _remove(handle: Patch) -> None:
    with _SWITCHING:
        for hook in handle._handles:
            hook.remove()
        for runtime in handle.runtimes:
            drop(runtime.module)
        for module in feature_modules(handle):
            unwatch(module)
        for runtime in handle.runtimes:
            if runtime.module._modules.get(PLANNER) is runtime.planner:
                del runtime.module._modules[PLANNER]
            swap_back(runtime.module)
        if not handle._paused:
            for edit in reversed(handle.edits):
                edit.revert()
        handle._handles, handle._places = [], []
        handle.model.__dict__.pop(MARK, None)
        handle.alive = False
        THREAD.top = None
        THREAD.forget()
