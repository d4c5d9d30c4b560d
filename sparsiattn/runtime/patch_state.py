"""`PatchState`: everything that a patch knows about its model, and every change it made to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsiattn.attention.example import Example
from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.given_structure import GivenStructure
from sparsiattn.attention.layout import Layout
from sparsiattn.attention.packing import PackedInput
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType, ModelChanged
from sparsiattn.runtime import placement, settings
from sparsiattn.runtime.attribute_override import AttributeOverride
from sparsiattn.runtime.block_runtime import KEEP_GRID, BlockRuntime
from sparsiattn.runtime.patch_owner import PatchOwner, new_key
from sparsiattn.runtime.sdpa_intercept import forget_compiled, hold
from sparsiattn.runtime.site_hooks import IDLE, hook_scope, owner_of
from sparsiattn.runtime.site_runtime import Observer, SiteRuntime
from sparsiattn.runtime.switches import switch_off, switch_on
from sparsiattn.runtime.thread_state import BLOCK_CALL
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.strategies.config import Config

PATCH_ATTRIBUTE = "_sparsiattn_patch"
"""Name under which a model's ``__dict__`` holds its patch."""

SWITCHING = threading.RLock()
"""Lock that is held while attribute overrides are switched or hooks are removed."""


@dataclass(frozen=True)
class ModelAttention:
    """The attention of one model at one input size.

    Attributes:
        backbone: Name of the adapter.
        example: The input of dry runs.
        sites: Sites that can be patched, with the layout of their operands.
        skipped: ``(name, reason)`` of attention that cannot be patched.
        unread: Names of sites whose attention weights nothing reads.
        lifted: Names of sites with hand-written attention.
        sums_bias: Names of sites whose bias is a sum that can be left uncomputed.
        map_module: Path of the convolution that makes tokens; None if there is none.
        map_size: Rows and columns of its output, or of the image.
        entrances: Paths of modules that a checkpoint may recompute with the same input.
        macs: Multiply-accumulates of the dense model for one image; None if not all are known.
        packed: How the model takes several images as one sequence; None if it does not.
    """

    backbone: str
    example: Example
    sites: tuple[tuple[Site, Layout], ...]
    skipped: tuple[tuple[str, str], ...]
    unread: frozenset[str] = frozenset()
    lifted: frozenset[str] = frozenset()
    sums_bias: frozenset[str] = frozenset()
    map_module: str | None = None
    map_size: Grid = (1, 1)
    entrances: tuple[str, ...] = ()
    macs: int | None = None
    packed: PackedInput | None = None


class PatchState(PatchOwner):
    """The data and decisions of a patch, and its changes to the model.

    Attributes:
        attention: The model's attention at the input size of patch time, or at a later one.
        strategy: The strategy passed to `patch`.
        kernel: The kernel name passed to `patch`.
        follows_model: Whether the input size was taken from the model, so that it may change later.
        structure: The structure of the model's sequences, as passed to `patch`; None if not passed.
        runtimes: One per patched site, in order.
        blocks: One per block that carries fewer tokens, in order.
        whole_blocks: ``(name, reason)`` of blocks that keep every token although others do not.
        overrides: Attributes of the host that patching switched.
        hooks: Handles of every registered hook.
        places: Path and module of every module that must not be replaced.
        links: ``(parent, name, module)`` of every module on those paths.
        recalls_maps: Whether hooks restore the map size for modules that a checkpoint recomputes.
        is_copy: Whether the patch was copied with its model or a part of it, or was unpickled.
        only_if_faster: Whether sites that were expected to be slower stay dense.
        speed_note: A note on the expected speed with a faster alternative, if the patch was
            expected to be slower when it was made; else empty.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: ModelAttention,
        strategy: Config,
        kernel: str,
        *,
        follows_model: bool,
        structure: GivenStructure | None = None,
    ) -> None:
        super().__init__(model, attention.map_size)
        self.structure = structure
        self.attention, self.strategy, self.kernel = attention, strategy, kernel
        self.follows_model = follows_model
        self.runtimes: list[SiteRuntime] = []
        self.blocks: list[BlockRuntime] = []
        self.whole_blocks: tuple[tuple[str, str], ...] = ()
        self.overrides: list[AttributeOverride] = []
        self.hooks: list[Any] = []
        self.places: list[tuple[str, nn.Module]] = []
        self.links: list[tuple[nn.Module, str, nn.Module]] = []
        self.is_copy = self.recalls_maps = False
        self.only_if_faster, self.speed_note = False, ""

    def __getstate__(self) -> dict[str, Any]:
        unwatched: dict[str, Any] = {"active_monitor": None, "monitored": {}, "went_dense": False}
        return {**self.__dict__, "running": {}, "parts": set(), **unwatched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, is_copy=True)
        self.key = new_key()  # `disabled` acts on the copy independently
        if self.alive:
            hold(self)
        for override in self.overrides:  # a copied object has the host's values
            switch_on(override, self)

    def __copy__(self) -> PatchState:
        """A patch with the same decisions for another model, without hooks or overrides."""
        bare = type(self).__new__(type(self))
        bare.__dict__.update(self.__dict__, overrides=[], hooks=[], places=[], links=[])
        bare.running, bare.parts, bare.recalls_maps = {}, set(), False
        bare.active_monitor, bare.monitored, bare.went_dense = None, {}, False
        bare.key = new_key()
        return bare

    @property
    def active(self) -> bool:
        """Whether the model still carries this patch."""
        return vars(self.model).get(PATCH_ATTRIBUTE) is self

    @property
    def title(self) -> str:
        """One line that names the strategy, the number of sites and the model."""
        count = len(self.runtimes)
        sites = "site" if count == 1 else "sites"
        return f"{self.strategy.name} on {count} {sites} of {type(self.model).__name__}"

    @property
    def backbone(self) -> str:
        """Name of the adapter."""
        return self.attention.backbone

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image in dry runs; of the first input tensor if the model takes no image."""
        return self.attention.example.shape

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """``(name, reason)`` of attention that was not patched."""
        return self.attention.skipped

    @property
    def model_sites(self) -> list[Site]:
        """All sites of the model, patched or not."""
        return [site for site, _ in self.attention.sites]

    @property
    def sites(self) -> list[Site]:
        """The patched sites."""
        return [runtime.site for runtime in self.runtimes]

    @property
    def runs_on_cpu(self) -> bool:
        """Whether the model's first parameter is on the CPU or the meta device."""
        first = next(self.model.parameters(), None)
        return placement.device_of(first).type in ("cpu", "meta")

    @property
    def has_learned_planners(self) -> bool:
        """Whether the patch has planners that `calibrate` can fit."""
        return any(isinstance(runtime.planner, LearnedPlanner) for runtime in self.runtimes)

    @property
    def shortens(self) -> bool:
        """Whether sequences get shorter on their way through the model."""
        # `bool` of a list is a graph break before torch 2.11
        return len(self.blocks) > 0 and self.blocks[0].placement not in KEEP_GRID

    @property
    def restores_last(self) -> bool:
        """Whether original positions are restored after the last block of a sequence."""
        return any(block.restores and block.last for block in self.blocks)

    def restores_from(self, index: int) -> bool:
        if BLOCK_CALL.restoring:
            return True
        return any(b.restores and (b.repeated or b.index >= index) for b in self.blocks)

    def describe_anew(self, attention: ModelAttention) -> None:
        """Update every site and block for another input size."""
        self.attention, self.map_size = attention, attention.map_size
        by_name = {site.name: (site, layout) for site, layout in attention.sites}
        for runtime in self.runtimes:
            runtime.site, runtime.layout = by_name[runtime.site.name]
        for block in self.blocks:
            block.site, block.rows = (by_name[s.name][0] for s in (block.site, block.rows))

    def note_links(self) -> None:
        """Store the path to every patched module, so that `check_sites` is fast."""
        links = {}
        for path, _ in self.places:
            holder = self.model
            for name in path.split(".") if path else ():
                child = holder._modules[name]
                assert child is not None
                links[holder, name] = holder, name, child
                holder = child
        self.links = list(links.values())

    def ensure_active(self, action: str) -> None:
        """Raise `ModelChanged` if the patch was undone or its model changed."""
        if not self.active:
            raise ModelChanged(f"{action}() needs a live patch, but this one was undone")
        self.check_sites()

    def check_sites(self) -> None:
        """Raise `ModelChanged` if a patched module or a parent of one was replaced or removed."""
        for holder, name, child in self.links:  # no generator: this runs before every pass
            if holder._modules.get(name) is not child:
                break
        else:
            return
        for path, module in self.places:
            present: nn.Module | None = self.model
            for name in path.split(".") if path else ():
                present = None if present is None else present._modules.get(name)
            if present is not module:
                raise ModelChanged(
                    f"site {path!r} is no longer the module that was patched "
                    f"(a {type(module).__name__} was replaced or deleted); call unpatch() and "
                    "patch the changed model again"
                )

    def turn_overrides_on(self, overrides: list[AttributeOverride]) -> None:
        """Switch these attributes of the host to the values that the patch needs."""
        self.overrides = overrides
        for override in overrides:
            switch_on(override, self)

    def turn_overrides_off(self) -> None:
        """Undo `turn_overrides_on`."""
        for override in reversed(self.overrides):
            switch_off(override, self)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Run the host's own attention inside the block, bit-equal to the unpatched model.

        It applies to the thread or asyncio task that entered the block, and to code that inherits
        its context (`asyncio.to_thread`, tasks created inside). In a generator it applies only
        while the generator runs. Other threads and tasks see the patch. With gradient
        checkpointing, run the backward pass inside the block too. Only `nn.TransformerEncoderLayer`
        can differ by rounding, as it leaves its fused path when it has hooks.
        """
        with settings.setting("disabled", self.key):
            yield self.model

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[nn.Module]:
        """Run dense attention inside the block, and pass every site's operands to a function.

        This is how planners are fitted, and how attention is measured or drawn.

        Args:
            observer: Called as ``observer(site, planner, inputs)`` before the host's attention.

        Raises:
            InvalidOption: This thread or task is observing already.
        """
        if settings.observer is not None:
            raise InvalidOption("this thread is observing a patch already; leave that block first")
        hook_idle_sites(self)
        with settings.setting("observer", (self.key, observer)):
            yield self.model


def set_dense(state: PatchState, runtime: SiteRuntime, dense: bool) -> None:
    """Choose whether a site of an installed patch runs the host's own attention."""
    runtime.dense = dense
    if not runtime.is_idle:
        hook_idle_sites(state)


def hook_idle_sites(state: PatchState) -> None:
    """Register the hooks of idle sites, for code that reads the operands of every site.

    Sites that always run the host's own attention have none before: they would only take time. The
    hooks stay until the patch is undone.
    """
    with SWITCHING:
        waiting = [r.module for r in state.runtimes if vars(r.module).get(IDLE) is not None]
        for module in waiting:
            state.hooks += hook_scope(module, vars(module).pop(IDLE))
    if waiting and state.active:  # a dry run's copy is not, and code that calls it may be compiling
        forget_compiled()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel or DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise InvalidType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        name = "module" if isinstance(model, parallel) else "_orig_mod"
        inner = model._modules.get(name)
        if inner is None:
            return model
        model = inner


def state_of(model: nn.Module) -> PatchState | None:
    """The active patch of a model (or of its copy); None if there is none."""
    return vars(unwrap(model)).get(PATCH_ATTRIBUTE)


def live_patches(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Patches of a model, of its submodules, and of a model that contains it.

    Yields:
        A module with hooks of a patch, and the patch.
    """
    for module in model.modules():
        patch = vars(module).get(PATCH_ATTRIBUTE) or owner_of(module)
        if patch is not None:
            yield module, patch
