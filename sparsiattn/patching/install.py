"""Installs a patch in a model, and removes it again."""

from __future__ import annotations

from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.kernels import cost
from sparsiattn.kernels.native import build
from sparsiattn.patching.discovery.backbone import Backbone, backbone_named
from sparsiattn.patching.distributed import RefuseUnreduced, planner_modules
from sparsiattn.runtime.block_hooks import EnterBlock, EnterTail, LeaveBlock, LeaveTail, ReopenBlock
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.class_swap import Hooked, mark_hooked, swap_class_back
from sparsiattn.runtime.compiled_parts import RefuseCompiledParts, places_that_hand_on
from sparsiattn.runtime.cross_layer import RecallCrossLayer, enclosing
from sparsiattn.runtime.hook_tools import hook_in_front, pre_hook_in_front
from sparsiattn.runtime.image import ForgetPacked, WatchImage, WatchMap, WatchPacked
from sparsiattn.runtime.lifting import drop, lift, put_off_sums_of, show_weights
from sparsiattn.runtime.mlp_bypass import EnterBypass, EnterSparedBlock, LeaveSparedBlock
from sparsiattn.runtime.multihead import RefuseWeights, swap, swap_back
from sparsiattn.runtime.ownership import runs_elsewhere
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE, SWITCHING, PatchState
from sparsiattn.runtime.restore import EnterModel, LeaveModel, modules_with_features, unwatch, watch
from sparsiattn.runtime.sdpa_intercept import forget_abandoned, forget_compiled, hold, release
from sparsiattn.runtime.site_hooks import IDLE, OpenScope, hook_scope
from sparsiattn.runtime.site_runtime import PLANNER, SiteRuntime
from sparsiattn.runtime.thread_state import SITE_CALLS, forget_pass
from sparsiattn.runtime.window_skip import EnterWindows, LeaveWindows, MaskWindows


def attach(state: PatchState) -> None:
    """Install the patch in its model. If that fails, everything is undone and the error raised."""
    build.is_ready()  # loads the shipped library, before a compiler traces code that needs it
    try:
        hold(state)
        for device in {parameter.device for parameter in state.model.parameters()}:
            cost.ready(device)
        state.model.__dict__[PATCH_ATTRIBUTE] = state
        backbone = backbone_named(state.backbone)
        for runtime in state.runtimes:
            _add_planner(state, runtime)
        for module in modules_with_features(state):
            watch(module, state)
        hook_up(state, backbone)
        # last, and undone first: a switched object's class must be the outermost one
        state.turn_overrides_on(backbone.attribute_overrides(state.model))
    except BaseException:
        remove(state)
        raise
    forget_compiled()


def hook_up(state: PatchState, backbone: Backbone) -> None:
    """Register every hook; comments say where the order matters."""
    model, hooks, map_module = state.model, state.hooks, state.attention.map_module
    if map_module is not None:
        hooks.append(model.get_submodule(map_module).register_forward_hook(WatchMap(state)))
    else:
        image = backbone.image_module(model)
        hooks.append(image.register_forward_pre_hook(WatchImage(state), with_kwargs=True))
    packed = state.attention.packed
    if packed is not None:
        taker = model.get_submodule(packed.module)
        hooks.append(taker.register_forward_pre_hook(WatchPacked(state, packed), with_kwargs=True))
        hooks.append(taker.register_forward_hook(ForgetPacked(state), always_call=True))
    # before the hooks of sites, since the model itself may be a site
    hooks.append(model.register_forward_pre_hook(EnterModel(state), with_kwargs=True))
    state.leave_hook = model.register_forward_hook(LeaveModel(state), always_call=True)
    hooks.append(state.leave_hook)
    if places_that_hand_on(state):
        hooks.append(model.register_forward_pre_hook(RefuseCompiledParts(state)))
    if planner_modules(state):
        hooks.append(model.register_forward_pre_hook(RefuseUnreduced(state)))
    storing = [r.site for r in state.runtimes if r.strategy.uses_cross_layer_state]
    for module in enclosing(model, storing):
        hooks.append(module.register_forward_pre_hook(RecallCrossLayer(state), with_kwargs=True))
    for runtime in state.runtimes:
        _hook_site(state, runtime)
    for block in state.blocks:
        _hook_block(state, block)
    state.note_links()


def _hook_site(state: PatchState, runtime: SiteRuntime) -> None:
    name, hooks = runtime.site.name, state.hooks
    module = state.model.get_submodule(name)
    state.places.append((name, module))
    is_multihead = swap(module)
    if is_multihead and name not in state.attention.unread:
        refuse = RefuseWeights(state, name)
        hooks.append(module.register_forward_pre_hook(refuse, with_kwargs=True))
    if name in state.attention.lifted:
        lift(module)
        hooks += show_weights(module)
    elif name in state.attention.sums_bias:
        put_off_sums_of(module)
    if not is_multihead:  # `swap` has changed its class already
        mark_hooked(module)
    opener = OpenScope(runtime)
    if runtime.is_idle and not _is_inside_site(state, name):
        vars(module)[IDLE] = opener
    else:
        hooks += hook_scope(module, opener)


def _is_inside_site(state: PatchState, name: str) -> bool:
    """Whether another site contains the module; compiled code then needs its hooks to tell them
    apart."""
    outer = (runtime.site.name for runtime in state.runtimes if runtime.site.name != name)
    return any(not other or name.startswith(f"{other}.") for other in outer)


def _hook_block(state: PatchState, runtime: BlockRuntime) -> None:
    model, block, hooks = state.model, runtime.block, state.hooks
    module, bypass = model.get_submodule(block.name), runtime.placement == "bypass"
    state.places.append((block.name, module))
    mark_hooked(module)
    if runtime.placement == "windows":
        _hook_windows(state, runtime, module)
        return
    enter = EnterSparedBlock(runtime) if bypass else EnterBlock(runtime)
    leave = LeaveSparedBlock(runtime) if bypass else LeaveBlock(runtime)
    # prepended, so that other hooks see the sequence that the block passes on
    hooks.append(pre_hook_in_front(module, enter, with_kwargs=True))
    hooks.append(hook_in_front(module, leave))
    if block.head is not None:
        head = model.get_submodule(block.head)
        hooks.append(head.register_forward_pre_hook(ReopenBlock(runtime)))
    if block.tail is None:
        return
    entry, last = (model.get_submodule(name) for name in (block.tail.entry, block.tail.exit))
    state.places += [(block.tail.entry, entry), (block.tail.exit, last)]
    if runtime.placement in ("middle", "bypass"):
        enter_tail = EnterBypass(runtime) if bypass else EnterTail(runtime)
        hooks.append(entry.register_forward_pre_hook(enter_tail))
        hooks.append(last.register_forward_hook(LeaveTail()))


def _hook_windows(state: PatchState, runtime: BlockRuntime, module: nn.Module) -> None:
    hooks, attention = state.hooks, state.model.get_submodule(runtime.block.sites[0])
    enter, leave, mask = (kind(runtime) for kind in (EnterWindows, LeaveWindows, MaskWindows))
    hooks.append(pre_hook_in_front(module, enter, with_kwargs=True))
    hooks.append(hook_in_front(module, leave))
    hooks.append(attention.register_forward_pre_hook(mask, with_kwargs=True))


def _add_planner(state: PatchState, runtime: SiteRuntime) -> None:
    module = state.model.get_submodule(runtime.site.name)
    if isinstance(runtime.planner, nn.Module):
        if PLANNER in module._modules or hasattr(module, PLANNER):
            raise InvalidOption(f"{runtime.site.name} already has a member named {PLANNER!r}")
        module.add_module(PLANNER, runtime.planner)


def remove(state: PatchState) -> None:
    """Undo everything that `attach` did, even if it stopped half-way."""
    if state.active_monitor is not None:
        state.active_monitor.close()
    with SWITCHING:
        elsewhere = runs_elsewhere(state)
        for hook in state.hooks:
            # passes in other threads still need the leave hook, which then removes itself
            if not (elsewhere and hook is state.leave_hook):
                hook.remove()
        state.turn_overrides_off()
        for _, module in state.places:
            swap_class_back(module, Hooked)
        for runtime in state.runtimes:
            vars(runtime.module).pop(IDLE, None)
            drop(runtime.module)
        for module in modules_with_features(state):
            unwatch(module)
        for runtime in state.runtimes:
            if runtime.module._modules.get(PLANNER) is runtime.planner:
                del runtime.module._modules[PLANNER]
            swap_back(runtime.module)
        state.hooks, state.places, state.links = [], [], []
        state.model.__dict__.pop(PATCH_ATTRIBUTE, None)
        state.alive = False
        SITE_CALLS.top = None
        forget_abandoned()
        forget_pass()
        release(state)
