"""`patch`: finds a model's attention, plans what to do with it, and only then changes the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.given_structure import GivenStructure
from sparsiattn.attention.layout import Layout
from sparsiattn.attention.site import Site
from sparsiattn.errors import AlreadyPatched, InvalidOption, InvalidType, SlowerThanDense
from sparsiattn.kernels.base import Kernel
from sparsiattn.patching.distributed import refuse_inside, refuse_wrapped
from sparsiattn.patching.estimate import settle_sites
from sparsiattn.patching.fit_grid import check_grids
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.install import attach
from sparsiattn.patching.known_calls import know_call, know_training
from sparsiattn.patching.model_speed import note_speed
from sparsiattn.patching.place_planner import place_planner
from sparsiattn.patching.places import fit_places
from sparsiattn.patching.replan import watch_changes
from sparsiattn.patching.schedule import Schedule, apply_schedule, read_schedule
from sparsiattn.patching.site_selection import Sites, named, select
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.patching.token_plan import plan_tokens, validate_token_plan
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.block_runtime import KEEP_GRID
from sparsiattn.runtime.patch_state import live_patches, unwrap
from sparsiattn.runtime.site_runtime import PlannerHome, SiteRuntime
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
    grid: tuple[int, ...] | None = None,
    prefix: int | None = None,
    suffix: int | None = None,
    specials: int | Sequence[int] | None = None,
    **options: Any,
) -> Patch:
    """Make a Vision Transformer attend sparsely, in place; the returned handle undoes it.

    Args:
        model: Any module whose attention calls scaled dot product attention.
        strategy: A registered name, or a `Strategy`, `TokenStrategy` or `Hybrid` object.
        k: Keys per query, as a share (float in (0, 1]) or a count (int); also a list with one
            entry per site, or a function of the `Site`.
        sites: Which sites to patch: a glob, a regular expression, a list of globs, or a predicate
            on `Site`.
        kernel: ``"auto"``, or the name of one kernel, which is then used without any fallback.
        only_if_faster: Whether to leave a site dense if the sparse kernel is not expected to be
            faster. None means True for a `Hybrid` and False otherwise.
        schedule: ``{"k": {site: budget}}``, ``{"keep": {block: budget}}``, both, or a JSON file.
        input: Image shape or example tensor; needed only if the model does not state its image
            size. Use tokens ``[B, N, C]`` for a part of a model, and a dict of keyword arguments or
            a tuple of positional ones for a model that takes no image. A model that needs real data
            is run once with it (in a copy that shares the weights), or with a random image of that
            shape.
        grid: Rows and columns of the patch tokens, or ``(views, rows, columns)``, if `inspect` does
            not find the right ones.
        prefix: Number of special tokens before the patches: class tokens, registers, prompts.
        suffix: Number of special tokens after the patches.
        specials: How many special tokens start every view, or their positions within a view.
        **options: Options of the strategy.

    Returns:
        The active patch.

    Warns:
        GuessedStructure: It is a guess which tokens are patches.
        SlowerThanDense: One image is expected to take longer than without the patch; the warning
            suggests alternatives. Never for ``"dense"``, and never if ``kernel`` names a kernel.

    Raises:
        SparsiattnError: The model cannot be patched like this, and is unchanged; the message says
            why.

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
    planned = plan_call(
        model,
        strategy,
        k=k,
        sites=sites,
        kernel=kernel,
        only_if_faster=only_if_faster,
        schedule=schedule,
        input=input,
        grid=grid,
        prefix=prefix,
        suffix=suffix,
        specials=specials,
        **options,
    )
    note_speed(planned)
    if planned.speed_note:  # before the model changes: a warning may be an error
        warnings.warn(f"{planned.title}: {planned.speed_note}", SlowerThanDense, stacklevel=2)
    return _put_on(planned)


def patch_quietly(model: nn.Module, *args: Any, **options: Any) -> Patch:
    """`patch` without a warning about speed, for code that measures speed or patches many times.

    Args:
        model: The model.
        *args: Further positional arguments of `plan_call`.
        **options: Further keyword arguments of `plan_call`.
    """
    return _put_on(plan_call(model, *args, **options))


def plan_call(
    model: nn.Module,
    strategy: str | Config = "connectivity",
    *,
    k: Budgets | None = None,
    sites: Sites = "*",
    kernel: str = "auto",
    only_if_faster: bool | None = None,
    schedule: Schedule = None,
    input: Any = None,
    grid: tuple[int, ...] | None = None,
    prefix: int | None = None,
    suffix: int | None = None,
    specials: int | Sequence[int] | None = None,
    cut_to_grid: bool = False,
    **options: Any,
) -> Patch:
    """Check and plan a call of `patch`, without changing the model.

    Args:
        model: The model. All arguments except ``cut_to_grid`` are those of `patch`.
        cut_to_grid: As in `plan_patch`.
    """
    inner, config = unwrap(model), resolve(strategy, k, options)
    if only_if_faster is None:
        only_if_faster = isinstance(config, Hybrid)
    if not isinstance(only_if_faster, bool):
        raise InvalidType(f"only_if_faster must be True, False or None, got {only_if_faster!r}")
    if isinstance(config, TokenStrategy) and sites != "*":
        raise InvalidOption(
            f"{config.name!r} makes the sequence shorter for whole blocks, so it takes "
            f"layers=[...] (block indices) instead of sites={sites!r}"
        )
    _refuse_second(inner)
    refuse_inside(inner)
    planned = plan_patch(
        inner,
        config,
        sites=sites,
        kernel=kernel,
        schedule=schedule,
        example=input,
        only_if_faster=only_if_faster,
        structure=GivenStructure.read(grid, prefix, suffix, specials),
        cut_to_grid=cut_to_grid,
    )
    refuse_wrapped(model, planned)
    return planned


def apply_strategy(model: nn.Module, strategy: Config, **options: Any) -> Patch:
    """Plan a patch and install it in the model.

    Args:
        model: The model.
        strategy: The strategy object.
        **options: Further arguments of `plan_patch`.
    """
    planned = plan_patch(model, strategy, **options)
    refuse_wrapped(model, planned)
    return _put_on(planned)


def _put_on(planned: Patch) -> Patch:
    attach(planned)
    watch_changes(planned)
    return planned


# inference mode changes the operators that a dry run sees, and marks all tensors made in it
@torch.inference_mode(False)
def plan_patch(
    model: nn.Module,
    strategy: Config,
    *,
    sites: Sites = "*",
    kernel: str = "auto",
    schedule: Schedule = None,
    example: Any = None,
    only_if_faster: bool = False,
    surveyed: ModelSurvey | None = None,
    structure: GivenStructure | None = None,
    cut_to_grid: bool = False,
) -> Patch:
    """Plan what a patch does at every site and block, without changing the model.

    It raises whatever `patch` raises; `attach` installs the result. A caller that patches one model
    many times can survey it once and pass the survey.

    Args:
        model: The model.
        strategy: The strategy object.
        sites: Which sites to patch, as in `patch`.
        kernel: ``"auto"`` or the name of a kernel.
        schedule: Budgets by site or block, as in `patch`.
        example: The ``input`` of `patch`.
        only_if_faster: Whether to leave sites dense that are not expected to be faster.
        surveyed: The survey of the model; None to make one.
        structure: The layout of the model's sequences as the user gives it.
        cut_to_grid: Whether to reduce tiles and summary keys that are too large for a grid instead
            of refusing them. Files saved before they were refused may contain such values.
    """
    attention, tokens = parts_of(strategy)
    kernels = _kernels(kernel)
    budgets = read_schedule(schedule, _schedule_kinds(attention, tokens))
    surveyed = surveyed or survey(model, example, named(sites), given=structure)
    # everything that may raise comes before `attach`, so that the model stays unchanged
    planned = Patch(
        model,
        surveyed.attention(model),
        strategy,
        kernel,
        follows_model=example is None,
        structure=surveyed.given,
    )
    selected = select(planned.model_sites, sites)
    resolved = attention.resolve_sites(selected)
    configs = apply_schedule(budgets.get("k", {}), selected, resolved)
    fitted = fit_places(dict(zip(selected, configs, strict=True)))
    if not cut_to_grid:
        check_grids(fitted)
    consumers = None if tokens is None else plan_tokens(planned, surveyed, tokens, budgets)
    _add_sites(planned, fitted, kernels)
    run = None
    if consumers is not None:
        know_call(planned, surveyed)
        run = validate_token_plan(planned, consumers, surveyed.returned)
        if planned.shortens:
            know_training(planned, surveyed)
    planned.only_if_faster = only_if_faster
    settle_sites(planned, run, only_if_faster)
    return planned


def parts_of(strategy: Config) -> tuple[Strategy, TokenStrategy | None]:
    """The attention strategy and the token strategy (if any) that a strategy consists of."""
    if isinstance(strategy, Hybrid):
        return strategy.parts()
    if isinstance(strategy, TokenStrategy):
        return DenseStrategy(), strategy
    assert isinstance(strategy, Strategy)
    return strategy, None


def resolve(strategy: str | Config, k: Budgets | None, options: dict[str, Any]) -> Config:
    """The strategy that `patch` uses.

    Args:
        strategy: A registered name, or a strategy object.
        k: Its budget; None if ``options`` or the object contain it.
        options: Its other options.

    Raises:
        InvalidType: ``strategy`` is neither a name nor an object.
        InvalidOption: Options were given together with an object, or the strategy does not take
            one of them.
        UnknownName: No strategy has that name.
    """
    fields = dict(options) if k is None else {"k": k, **options}
    if isinstance(strategy, Config):
        if fields:
            raise InvalidOption(
                f"options {sorted(fields)} cannot be combined with a strategy object; set them on "
                f"the object: {type(strategy).__name__}(...)"
            )
        return strategy
    if not isinstance(strategy, str):
        raise InvalidType(
            f"strategy must be a name or a Strategy object, got {strategy!r}; "
            "sparsiattn.list_strategies() lists the names"
        )
    kind: type[Config] = REGISTRY.get("strategies", strategy)
    return kind.build(fields)


def _schedule_kinds(attention: Strategy, tokens: TokenStrategy | None) -> list[str]:
    kinds = [] if isinstance(attention, DenseStrategy) and tokens is not None else ["k"]
    return kinds + ([] if tokens is None else list(tokens.per_layer))


def _kernels(name: str) -> tuple[Kernel, ...]:
    if name == "auto":
        return tuple(REGISTRY.all("kernels").values())
    return (REGISTRY.get("kernels", name),)


def _refuse_second(model: nn.Module) -> None:
    for module, present in live_patches(model):
        where = "this model" if module is model else f"a part of it, a {type(module).__name__},"
        raise AlreadyPatched(f"{where} already has {present!r}; call unpatch() on it first")


def _add_sites(planned: Patch, configs: dict[Site, Strategy], kernels: tuple[Kernel, ...]) -> None:
    """Add a runtime for every selected site.

    With a token strategy the other sites get one, too, with dense attention: fewer tokens reach
    them.
    """
    for site, layout in planned.attention.sites:
        if site in configs:
            explicit = planned.kernel != "auto"
            runtime = _runtime(planned, site, layout, configs[site], kernels, explicit)
        elif planned.tokens is not None:
            runtime = _runtime(planned, site, layout, DenseStrategy(), kernels, explicit=False)
            runtime.selected = False
        else:
            continue
        planned.runtimes.append(runtime)
    by_name = {runtime.site.name: runtime for runtime in planned.runtimes}
    for block in planned.blocks:
        # where the grid stays complete, attention sees complete windows, as without a patch
        for name in () if block.placement in KEEP_GRID else block.block.sites:
            by_name[name].block = block.index
        if isinstance(block.planner, nn.Module):
            _house(block.planner, by_name[block.site.name])
    storing = [r for r in planned.runtimes if r.strategy.uses_cross_layer_state]
    if storing:
        storing[0].first_cross_layer = storing[-1].last_cross_layer = True


def _runtime(
    planned: Patch,
    site: Site,
    layout: Layout,
    config: Strategy,
    kernels: tuple[Kernel, ...],
    explicit: bool,
) -> SiteRuntime:
    module = planned.model.get_submodule(site.name)
    planner = place_planner(lambda: config.planner(site), module, training=module.training)
    runtime = SiteRuntime(site, layout, config, planner, kernels, explicit, planned, module)
    runtime.sums_bias = site.name in planned.attention.sums_bias
    return runtime


def _house(planner: nn.Module, runtime: SiteRuntime) -> None:
    """Register a learned token score as a submodule of the planner of the block's first site."""
    if not isinstance(runtime.planner, nn.Module):
        runtime.planner = PlannerHome(runtime.planner)
    runtime.planner.add_module("tokens", planner)
