"""`patch`: find a model's attention, choose what to do with it, and only then change it."""

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
        k: Share (float in (0, 1]) or count (int) of keys per query, a list with one per site, or
            a function of the `Site`.
        sites: Glob, regular expression, list of globs, or predicate on `Site`.
        kernel: ``"auto"`` or a name, which then never falls back.
        only_if_faster: Leave a site dense where the sparse kernel is not expected to win; None
            stands for True with a `Hybrid` and for False otherwise.
        schedule: ``{"k": {site: budget}}``, ``{"keep": {block: budget}}``, both, or a JSON file.
        input: Image shape or example tensor, needed only where the model does not say; tokens
            ``[B, N, C]`` for a part of a model, a dict of keyword arguments or a tuple of
            positional ones for what takes no image. A model that does not run without data runs
            once with it (in a copy that shares the weights), or with a random image of its shape.
        grid: Rows and columns of the patch tokens, or ``(views, rows, columns)``, where the model's
            sequences are not what `inspect` finds.
        prefix: Special tokens before the patches: class tokens, registers, prompts.
        suffix: Special tokens behind them.
        specials: How many special tokens start every view, or their positions within a view.
        **options: The strategy's own.

    Returns:
        The live patch.

    Warns:
        GuessedStructure: Nothing tells which tokens are patches.
        SlowerThanDense: One image is expected to take longer than without the patch; the warning
            says what to type instead. Never for ``"dense"`` and where ``kernel`` is named.

    Raises:
        SparsiattnError: The message names the fault; the model is unchanged.

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
    """As `patch`, without a word on speed: for code that measures it, or patches many times.

    Args:
        model: The model.
        *args: Others of `plan_call`.
        **options: Others of `plan_call`.
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
    """What `patch` was asked for, checked and planned; the model is not touched yet.

    Args:
        model: As in `patch`, and so are the others but the next.
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
    """Plan a patch and put it into the model; arguments as `plan_patch` takes them.

    Args:
        model: The model.
        strategy: The strategy object.
        **options: Others of `plan_patch`.
    """
    planned = plan_patch(model, strategy, **options)
    refuse_wrapped(model, planned)
    return _put_on(planned)


def _put_on(planned: Patch) -> Patch:
    attach(planned)
    watch_changes(planned)
    return planned


# inference mode shows dry runs other operators, and marks all that is made in it
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
    """A patch that knows what to do at every site and block; the model is not touched yet.

    It refuses what `patch` refuses; `attach` puts it into the model. A caller that patches one
    model many times surveys it once and passes the survey on.

    Args:
        model: As in `patch`, and so are ``sites``, ``kernel`` and ``schedule``.
        strategy: The strategy object.
        example: The ``input`` of `patch`.
        only_if_faster: As in `patch`, decided.
        surveyed: The model's attention; None to look for it.
        structure: What the user says of the model's sequences.
        cut_to_grid: Whether tiles and summary keys for which a grid is too small are cut to it:
            files saved before that was refused may ask for such.
    """
    attention, tokens = parts_of(strategy)
    kernels = _kernels(kernel)
    budgets = read_schedule(schedule, _schedule_kinds(attention, tokens))
    surveyed = surveyed or survey(model, example, named(sites), given=structure)
    # everything that may refuse comes before `attach`, so that the model stays as it was
    planned = Patch(
        model,
        surveyed.attention(model),
        strategy,
        kernel,
        follows_model=example is None,
        structure=surveyed.given,
    )
    selected = select(planned.model_sites, sites)
    resolved = [attention.resolve_for(site, i, len(selected)) for i, site in enumerate(selected)]
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
    """The attention strategy and the token strategy of whatever `patch` was given."""
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
        k: Its budget; None if ``options`` or the object say it.
        options: Its other options.

    Raises:
        InvalidType: ``strategy`` is neither.
        InvalidOption: Options beside an object, or ones that the strategy does not take.
        UnknownName: No strategy has that name.
    """
    fields = dict(options) if k is None else {"k": k, **options}
    if isinstance(strategy, Config):
        if fields:
            raise InvalidOption(
                f"options {sorted(fields)} beside a strategy object; put them into the object: "
                f"{type(strategy).__name__}(...)"
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
        raise AlreadyPatched(f"{where} carries {present!r}; call unpatch() on it first")


def _add_sites(planned: Patch, configs: dict[Site, Strategy], kernels: tuple[Kernel, ...]) -> None:
    """One runtime for every selected site.

    Sites of the blocks that carry fewer tokens are reached also where attention stays dense.
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
        # where the grid stays, attention sees whole windows, as without a patch
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
    """Put a learned token score where it is found: into the planner of the block's first site."""
    if not isinstance(runtime.planner, nn.Module):
        runtime.planner = PlannerHome(runtime.planner)
    runtime.planner.add_module("tokens", planner)
