"""`patch`: find a model's attention, choose what to do with it, and only then change it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsiattn.attention.layout import Layout
from sparsiattn.attention.site import Site
from sparsiattn.errors import AlreadyPatched, InvalidOption, InvalidType, NothingToPatch
from sparsiattn.kernels.base import Kernel
from sparsiattn.patching.discovery.backbone import Backbone
from sparsiattn.patching.discovery.probe import Call, DryInputs, meta_copy, probe
from sparsiattn.patching.schedule import Schedule, apply_schedule, read_schedule
from sparsiattn.patching.site_selection import Sites, named, select
from sparsiattn.patching.token_plan import carry
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.handle import MARK, Patch, attach, unwrap
from sparsiattn.runtime.site_runtime import OpenScope, PlannerHome, SiteRuntime
from sparsiattn.strategies.base import Budgets, Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.dense import DenseStrategy
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.strategies.token_base import TokenStrategy


def patch(
    model: nn.Module,
    strategy: str | Config = "connectivity",
    *,
    k: Budgets | None = None,
    sites: Sites = "*",
    kernel: str = "auto",
    only_if_faster: bool | None = None,
    schedule: Mapping[str, Any] | str | PathLike[str] | None = None,
    input: Any = None,
    **options: Any,
) -> Patch:
    """Make a Vision Transformer attend sparsely, in place; the returned handle undoes it.

    model: any module whose attention calls scaled dot product attention. strategy: a registered
    name, or a `Strategy`, `TokenStrategy` or `Hybrid` object. k: share (float in (0, 1]) or count
    (int) of keys per query, a list with one per site, or a function of the `Site`. sites: glob,
    regular expression, list of globs, or predicate on `Site`. kernel: ``"auto"`` or a name, which
    then never falls back. only_if_faster: leave a site dense where the sparse kernel is not
    expected to win; None means so for `Hybrid`. schedule: ``{"k": {site: budget}}``, ``{"keep":
    {block: budget}}``, both, or a JSON file. input: image shape or example tensor, needed only
    where the model does not say. options: the strategy's own.

    Raises a `SparsiattnError` that names the fault, with the model untouched.

    >>> import timm, torch, sparsiattn
    >>> model = timm.create_model("test_vit").eval()
    >>> x = torch.randn(1, 3, 160, 160)
    >>> with torch.no_grad():
    ...     before = model(x)
    ...     with sparsiattn.patch(model, strategy="connectivity", k=0.1):
    ...         changed = not torch.equal(model(x), before)
    ...     changed, torch.equal(model(x), before)
    (True, True)
    """
    model = unwrap(model)
    base = resolve(strategy, k, options)
    faster = isinstance(base, Hybrid) if only_if_faster is None else only_if_faster
    if not isinstance(faster, bool):
        raise InvalidType(f"only_if_faster must be True, False or None, got {only_if_faster!r}")
    if isinstance(base, TokenStrategy) and sites != "*":
        raise InvalidOption(
            f"{base.name!r} makes the sequence shorter for whole blocks, so it takes layers=[...] "
            f"(block indices) instead of sites={sites!r}"
        )
    _refuse_second(model)
    handle = _prepared(model, base, sites, kernel, schedule, input, faster)
    attach(handle)
    return handle


def applied(
    model: nn.Module, base: Config, schedule: Schedule, example: Any, only_if_faster: bool,
    seen: ModelSurvey,
) -> Patch:  # fmt: skip
    """`patch` for who patches one model many times and looks for its attention once."""
    handle = _prepared(model, base, "*", "auto", schedule, example, only_if_faster, seen)
    attach(handle)
    return handle


def planned(model: nn.Module, base: Config, example: Any, seen: ModelSurvey) -> Patch:
    """The patch that a strategy would be, never attached; refused as `patch` would refuse it."""
    return _prepared(model, base, "*", "auto", None, example, False, seen)


def _prepared(
    model: nn.Module, base: Config, sites: Sites, kernel: str, schedule: Schedule, example: Any,
    only_if_faster: bool, seen: ModelSurvey | None = None,
) -> Patch:  # fmt: skip
    """A handle that knows what to do at every site and block; the model is not touched yet."""
    attention, tokens = parts_of(base)
    kernels = _kernels(kernel)
    budgets = read_schedule(schedule, _schedule_kinds(attention, tokens))
    seen = seen or survey(model, example, named(sites))
    meta_model, handle, found = _find(model, base, kernel, example, seen)
    chosen = select([site for site, _ in found], sites)
    resolved = _budgets(attention, chosen, budgets.get("k", {}))
    if tokens is not None:
        carry(handle, meta_model, tokens, budgets)
    layouts = dict(found)
    for site, config in zip(chosen, resolved, strict=True):
        handle.runtimes.append(_runtime(handle, site, layouts[site], config, kernels, kernel))
    if tokens is not None:
        _complete(handle, layouts, kernels)
    carrying = [runtime for runtime in handle.runtimes if runtime.strategy.uses_cross_layer_state]
    if carrying:
        carrying[0].opens = carrying[-1].closes = True
    _check(handle, only_if_faster, seen.returned)
    return handle


def parts_of(base: Config) -> tuple[Strategy, TokenStrategy | None]:
    """The attention strategy and the token strategy of whatever `patch` was given."""
    if isinstance(base, Hybrid):
        return base.parts()
    if isinstance(base, TokenStrategy):
        return DenseStrategy(), base
    assert isinstance(base, Strategy)
    return base, None


def _schedule_kinds(attention: Strategy, tokens: TokenStrategy | None) -> list[str]:
    kinds = [] if isinstance(attention, DenseStrategy) and tokens is not None else ["k"]
    return kinds + ([] if tokens is None else list(tokens.per_layer))


def _runtime(
    handle: Patch, site: Site, layout: Layout, config: Strategy, kernels: tuple[Kernel, ...],
    kernel: str,
) -> SiteRuntime:  # fmt: skip
    module = handle.model.get_submodule(site.name)
    planner = _planner(config, site, handle.model)
    return SiteRuntime(site, layout, config, planner, kernels, kernel != "auto", handle, module)


def _complete(handle: Patch, layouts: dict[Site, Layout], kernels: tuple[Kernel, ...]) -> None:
    """Sites of the blocks that carry fewer tokens are reached also where attention stays dense, and
    learned token scores find their home in them."""
    reached = {runtime.site for runtime in handle.runtimes}
    for site in handle.found:
        if site not in reached:
            extra = _runtime(handle, site, layouts[site], DenseStrategy(), kernels, "auto")
            extra.selected = False
            handle.runtimes.append(extra)
    handle.runtimes.sort(key=lambda runtime: runtime.site.index)
    by_name = {runtime.site.name: runtime for runtime in handle.runtimes}
    for block in handle.blocks:
        for name in block.block.sites if block.place != "bypass" else ():
            by_name[name].block = block.index
        if isinstance(block.planner, torch.nn.Module):
            runtime = by_name[block.site.name]
            if not isinstance(runtime.planner, torch.nn.Module):
                runtime.planner = PlannerHome(runtime.planner)
            runtime.planner.add_module("tokens", block.planner)


def _check(handle: Patch, only_if_faster: bool, dense: list[torch.Size]) -> None:
    """What only a dry run of the patched model can tell, before the model is touched."""
    from sparsiattn.patching.dry_run import validate_token_plan
    from sparsiattn.patching.estimate import leave_slow_sites_dense, refuse_early

    if handle.blocks:
        validate_token_plan(handle, dense)
    if handle.kernel != "auto":
        refuse_early(handle)
    if only_if_faster:
        leave_slow_sites_dense(handle)


def _refuse_second(model: nn.Module) -> None:
    for module, live in live_patches(model):
        where = "this model" if module is model else f"a part of it, a {type(module).__name__},"
        raise AlreadyPatched(f"{where} carries {live!r}; call unpatch() on it first")


def live_patches(model: nn.Module) -> Iterator[tuple[nn.Module, Patch]]:
    """Patches of the model, of its parts, and of a model that it is a part of, each with a module
    that carries it."""
    for module in model.modules():
        hooks = module._forward_pre_hooks.values()
        owners = [hook.runtime.owner for hook in hooks if isinstance(hook, OpenScope)]
        live = vars(module).get(MARK) or next(iter(owners), None)
        if live is not None:
            yield module, live


def resolve(strategy: str | Config, k: Budgets | None, options: dict[str, Any]) -> Config:
    """The strategy that `patch` is asked for."""
    given = dict(options) if k is None else {"k": k, **options}
    if isinstance(strategy, Config):
        if given:
            raise InvalidOption(
                f"options {sorted(given)} beside a strategy object; put them into the object: "
                f"{type(strategy).__name__}(...)"
            )
        return strategy
    if not isinstance(strategy, str):
        raise InvalidType(
            f"strategy must be a name or a Strategy object, got {strategy!r}; "
            "sparsiattn.strategies() lists the names"
        )
    found: type[Config] = REGISTRY.get("strategies", strategy)
    return found.build(given)


def _kernels(name: str) -> tuple[Kernel, ...]:
    if name == "auto":
        return tuple(REGISTRY.all("kernels").values())
    return (REGISTRY.get("kernels", name),)


_SQUARE = (1, 3, 1, 1)


class ModelSurvey(NamedTuple):
    """What a dry run of a copy without data says about a model: its adapter, the shape of one
    image, the copy, every call of attention, the sites, ``(name, reason)`` of what is left, and the
    shapes of what it returned."""

    backbone: Backbone
    shape: tuple[int, ...]
    meta_model: nn.Module
    calls: list[Call]
    found: list[tuple[Site, Layout]]
    skipped: list[tuple[str, str]]
    returned: list[torch.Size]


def survey(
    model: nn.Module, example: Any, names: Collection[str] = (), inputs: DryInputs | None = None
) -> ModelSurvey:
    """Look for attention in a copy of the model; finding none is no error here. names: of sites
    that are wanted even where nothing can be saved. inputs: what to call the copy with, where that
    is not, or not only, an image; then the model need not say how large its images are."""
    backbone = backbone_of(model)
    if inputs is None or example is not None:
        shape = _input_shape(model, backbone, example)
    else:
        shape = backbone.input_shape(model) or _SQUARE
    meta_model = meta_copy(model)
    for edit in backbone.attribute_overrides(meta_model):
        edit.apply()
    seen = probe(meta_model, inputs or backbone.meta_inputs(meta_model, shape))
    rows, columns = backbone.patch_size(model)
    found, left = backbone.sites(seen.calls, shape[-2] * columns / (shape[-1] * rows), names)
    return ModelSurvey(
        backbone, shape, meta_model, seen.calls, found, left + seen.softmaxes, seen.returned
    )


def _find(
    model: nn.Module, strategy: Config, kernel: str, example: Any, seen: ModelSurvey
) -> tuple[nn.Module, Patch, list[tuple[Site, Layout]]]:
    """A copy without data, an empty handle and the model's sites, from a dry run of the copy."""
    backbone, shape, meta_model, calls, found, left, _ = seen
    if not found:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left)
        raise NothingToPatch(
            f"{type(model).__name__} has no attention to patch: no module of it calls scaled dot "
            f"product attention (or writes it out) in a way that can be served{reasons or ''}"
        )
    handle = Patch(model, strategy, kernel, backbone, shape, left)
    handle.follows_model = example is None
    handle.found = tuple(site for site, _ in found)
    handle.unread = frozenset(call.name for call in calls if call.weights == "ignored")
    handle.lifted = frozenset(call.name for call in calls if call.lifted)
    return meta_model, handle, found


def refresh(handle: Patch) -> None:
    """Describe the sites anew if the model was set to another input size since."""
    model = handle.model
    backbone = REGISTRY.get("backbones", handle.backbone)
    if not handle.follows_model or backbone.input_shape(model) == handle.input_shape:
        return
    seen = survey(model, None, {site.name for site in handle.sites})
    _, fresh, found = _find(model, handle.strategy, handle.kernel, None, seen)
    handle.input_shape, handle.skipped, handle.found = fresh.input_shape, fresh.skipped, fresh.found
    by_name = {site.name: (site, layout) for site, layout in found}
    for runtime in handle.runtimes:
        runtime.site, runtime.layout = by_name[runtime.site.name]
    for block in handle.blocks:
        block.site = by_name[block.site.name][0]


def backbone_of(model: nn.Module) -> Backbone:
    """The adapter that serves a model: the first whose family it is of."""
    for backbone in REGISTRY.all("backbones").values():
        if not backbone.why_not(model):
            return backbone  # type: ignore[no-any-return]
    raise NothingToPatch(f"no backbone adapter fits {type(model).__name__}")


def _input_shape(model: nn.Module, backbone: Backbone, example: Any) -> tuple[int, ...]:
    if example is None:
        shape = backbone.input_shape(model)
        if shape is None:
            raise InvalidOption(
                f"{type(model).__name__} does not say its input size (no pretrained_cfg, no "
                "config): pass input=(1, channels, height, width) or an example tensor"
            )
        return shape
    sizes = example.shape if isinstance(example, torch.Tensor) else example
    shape = tuple(sizes) if isinstance(sizes, (tuple, list)) else ()
    if len(shape) < 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidOption(
            f"input must be (1, channels, height, width) or an example tensor, got {example!r}"
        )
    return (1, *(shape[1:] if len(shape) > 3 else shape))


def _budgets(strategy: Strategy, sites: list[Site], schedule: Mapping[str, Any]) -> list[Strategy]:
    resolved = [strategy.resolve_for(site, i, len(sites)) for i, site in enumerate(sites)]
    return apply_schedule(schedule, sites, resolved)


def _planner(strategy: Strategy, site: Site, model: nn.Module) -> Any:
    """The site's planner, where the site's own weights are; never made of inference tensors."""
    with torch.inference_mode(False):
        planner = strategy.planner(site)
        if isinstance(planner, nn.Module):
            host = model.get_submodule(site.name)
            like = next(host.parameters(), None)
            if like is not None:
                dtype = like.dtype if like.is_floating_point() else None
                planner.to(device=like.device, dtype=dtype)
            planner.train(host.training)
    return planner
