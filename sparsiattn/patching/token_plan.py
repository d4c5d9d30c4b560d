"""Plans a token strategy for a model at patch time.

The plan says which blocks reduce tokens, where in the block, and where positions are restored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from sparsiattn.attention.block import Block
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, ProbeFailed, SparsiattnError
from sparsiattn.patching.discovery.blocks import find_blocks, in_training
from sparsiattn.patching.discovery.consumers import Consumers
from sparsiattn.patching.dry_run import DryRun, dry_run
from sparsiattn.patching.place_planner import place_planner
from sparsiattn.patching.places import require_ends
from sparsiattn.patching.schedule import token_budgets
from sparsiattn.patching.survey import ModelSurvey
from sparsiattn.patching.token_blocks import row_sites, token_blocks
from sparsiattn.patching.towers import (
    Tower,
    check_alike,
    class_tokens_of,
    consumers_of,
    find_towers,
)
from sparsiattn.patching.window_plan import cut_of
from sparsiattn.runtime.block_runtime import BlockRuntime, Placement
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.strategies.token_base import TokenStrategy


def plan_tokens(
    state: PatchState, surveyed: ModelSurvey, tokens: TokenStrategy, schedule: Mapping[str, Any]
) -> Consumers:
    """Set the blocks of a patch, and what each of them does.

    Args:
        state: The patch, not installed yet.
        surveyed: The survey of the model.
        tokens: The token strategy.
        schedule: Budgets by block.

    Returns:
        The consumers of the blocks' outputs.

    Raises:
        InvalidOption: The model cannot carry fewer tokens with this strategy.
    """
    model, sites = state.model, {site.name: site for site in state.model_sites}
    name = type(model).__name__
    backbone = surveyed.backbone
    inputs = surveyed.inputs()
    blocks = find_blocks(surveyed.meta_model, sites, inputs)
    if not blocks:
        raise InvalidOption(
            f"{name} has no blocks for token strategies, which need modules that contain "
            "attention and an MLP; use an attention strategy, e.g. 'connectivity'"
        )
    if backbone.packs_batch(model):
        raise InvalidOption(
            f"{name} packs the images of a batch into one sequence, where images would compete for "
            "the tokens to keep; use an attention strategy, e.g. 'connectivity'"
        )
    chosen = token_blocks(blocks, sites, surveyed.map_module, tokens)
    state.whole_blocks = chosen.others
    blocks, plain = in_training(surveyed.meta_model, chosen.blocks, inputs), chosen.plain
    rows = _rows(blocks, sites, name)
    require_ends(tokens, rows)
    if not plain and any(site.suffix_tokens for site in rows):
        raise InvalidOption(
            f"{name} has special tokens after the patches, which token strategies support only if "
            "one sequence runs through all blocks; use an attention strategy, e.g. 'connectivity'"
        )
    towers, consumers = [Tower(0, blocks)], Consumers()
    if plain:
        consumers = consumers_of(surveyed.meta_model, blocks, sites, inputs)
        towers = find_towers(blocks, consumers, name)
    else:
        check_hierarchy(tokens.for_model(0, True, name), name)
    if tokens.skips_windows():
        check_windows(state, plain, name)
    state.blocks, resolved = [], []
    for tower in towers:
        class_tokens = class_tokens_of(backbone, model, tower, sites) if plain else 0
        adapted = tokens.for_model(class_tokens, not plain, name)
        adapted, configs = _resolve(adapted, tower.blocks, sites, schedule)
        resolved.append(adapted)
        runtimes = _runtimes(state, tower, sites, rows, class_tokens)
        for index, config in configs.items():
            _let_reduce(runtimes[index], config, plain)
            if runtimes[index].placement == "windows":
                runtimes[index].cut = cut_of(runtimes[index])
        state.blocks += _trimmed(runtimes, plain)
    check_alike(towers, resolved, name)
    state.tokens, state.proportional = resolved[0], resolved[0].proportional_attention()
    state.reads_prefix = reads_prefix(state, consumers)
    if plain:
        _heed_hooks(state, surveyed.read_by_hooks)
    return consumers


def reads_prefix(state: PatchState, consumers: Consumers) -> bool:
    """Whether all consumers of the last sequence read prefix tokens only.

    The positions of other tokens differ between the images of a padded batch.
    """
    last = [block.index for block in state.blocks if block.last]
    return not any(consumers.need_all(index, uneven=True) for index in last)


def _heed_hooks(state: PatchState, readers: Collection[str]) -> None:
    """Refuse models whose own hooks read tokens inside a block that carries fewer tokens.

    Raises:
        InvalidOption: There is such a hook.
    """
    blocks = [runtime.block.name for runtime in state.blocks]
    for name in readers:
        if any(name.startswith(f"{block}.") for block in blocks):
            raise InvalidOption(
                f"{type(state.model).__name__} has its own hook on {name!r}, which reads tokens "
                "inside a block that would carry fewer of them; use an attention strategy such as "
                "'connectivity', or layers= after it"
            )


def _runtimes(
    state: PatchState,
    tower: Tower,
    sites: Mapping[str, Site],
    rows: Sequence[Site],
    class_tokens: int,
) -> list[BlockRuntime]:
    """A runtime for each block of a tower."""
    return [
        BlockRuntime(
            block,
            sites[block.sites[0]],
            tower.start + i,
            len(tower.blocks),
            state,
            class_tokens,
            rows[tower.start + i],
            start=tower.start,
            repeated=tower.repeated,
        )
        for i, block in enumerate(tower.blocks)
    ]


def _rows(blocks: Sequence[Block], sites: Mapping[str, Site], model: str) -> list[Site]:
    """The result of `row_sites`; raises if a block has no such site."""
    known = []
    for block, site in zip(blocks, row_sites(blocks, sites), strict=True):
        if site is None:
            raise InvalidOption(
                f"{model} passes tokens between blocks in a form other than [B, N, C] (for one "
                f"image: {list(block.input_shape)}), which token strategies cannot shorten; use an "
                "attention strategy such as 'connectivity'"
            )
        known.append(site)
    return known


def check_hierarchy(tokens: TokenStrategy, model: str) -> None:
    """Check a token strategy for models with windows or stages.

    Their grid must stay complete, so tokens can only skip the MLP.

    Raises:
        InvalidOption: The strategy does more than that.
    """
    if not (tokens.reads_attention() or tokens.is_ragged() or tokens.merges()):
        return
    raise InvalidOption(
        f"{model} attends in windows or changes its grid between stages, so every token must stay, "
        f"which {tokens.name!r} with these options does not allow. Use token_drop with "
        "score='norm', 'random' or 'learned' and a fixed keep (dropped tokens skip only the MLP), "
        "add skip='window' (complete windows skip blocks), or use an attention strategy such as "
        "'connectivity'"
    )


def check_windows(state: PatchState, plain: bool, model: str) -> None:
    """Check a token strategy with ``skip="window"``.

    Raises:
        InvalidOption: The model has no windows, or an attention strategy is used as well.
    """
    if plain:
        raise InvalidOption(
            f"skip='window' needs blocks that attend in windows, and {model} has none: omit skip=, "
            "so that dropped tokens leave the sequence"
        )
    if not isinstance(state.strategy, TokenStrategy):
        raise InvalidOption(
            "skip='window' cannot be combined with an attention strategy, which is planned for all "
            f"windows of a block: use token_drop alone, got {state.strategy.name!r}"
        )


def _resolve(
    tokens: TokenStrategy,
    blocks: list[Block],
    sites: Mapping[str, Site],
    schedule: Mapping[str, Any],
) -> tuple[TokenStrategy, dict[int, TokenStrategy]]:
    """The config in the form that is saved, and one config for each reducing block."""
    tokens = token_budgets(schedule, tokens, [block.name for block in blocks])
    layers = tokens.layers_in(len(blocks))
    configs = {
        layer: tokens.resolve_for(sites[blocks[layer].sites[0]], i, len(layers))
        for i, layer in enumerate(layers)
    }
    lists: dict[str, Any] = {
        name: [getattr(config, name) for config in configs.values()]
        for name in tokens.per_layer
        if callable(getattr(tokens, name, None))
    }
    return replace(tokens, layers=layers, **lists), configs


def _let_reduce(runtime: BlockRuntime, strategy: TokenStrategy, plain: bool) -> None:
    """Make a block reduce tokens with this strategy."""
    model = runtime.owner.model
    runtime.strategy = strategy
    runtime.planner = place_planner(
        lambda: strategy.planner(runtime.site, runtime.block.output_shape[-1]),
        model.get_submodule(runtime.block.name),
        training=model.training,
    )
    runtime.placement = placement_of(strategy, runtime.block, plain, type(model).__name__)


def placement_of(tokens: TokenStrategy, block: Block, plain: bool, model: str) -> Placement:
    """Where in a block tokens are reduced.

    Args:
        tokens: Its token strategy.
        block: The block.
        plain: Whether one sequence runs through all blocks; see `is_plain`.
        model: The model's name, for errors.

    Raises:
        InvalidOption: The block cannot reduce tokens.
    """
    if tokens.skips_windows():
        return "windows"
    if plain:
        placement = tokens.placement()
        tail = block.tail
        if tail is None or tail.mixes or tail.eval_only or tail.shape != block.output_shape:
            return "exit" if placement == "middle" else placement
        return placement
    if block.tail is None or block.tail.mixes:
        why = "no separate MLP branch"
        if block.tail is not None:
            why = f"an MLP that mixes tokens ({block.tail.mixes})"
        raise InvalidOption(
            f"{model}: block {block.name!r} has {why}, so no token can skip it; use an "
            "attention strategy such as 'connectivity', or other layers="
        )
    return "bypass"


def _trimmed(blocks: list[BlockRuntime], plain: bool) -> list[BlockRuntime]:
    """The blocks that need hooks: all from the first reduction on; with stages, to its stage's end.

    Also marks the first and the last of them.
    """
    start = next(i for i, runtime in enumerate(blocks) if runtime.placement)
    if blocks[0].repeated:  # the first block takes the sequence that the last one reduced
        start = 0
    blocks[start].first = True
    blocks[-1].last = True
    blocks = blocks[start:]
    if plain:
        return blocks
    for before, runtime in pairwise(blocks):
        block = runtime.block
        shapes = {before.block.output_shape, block.input_shape, block.output_shape}
        same_stage = block.after and len(shapes) == 1
        can_spare = block.tail is not None and not block.tail.mixes
        spares = before.placement == "bypass"
        if runtime.placement is None and same_stage and spares and can_spare:
            runtime.placement = "bypass"
        runtime.first = not same_stage or before.placement is None
    return [runtime for runtime in blocks if runtime.placement]


def validate_token_plan(state: PatchState, consumers: Consumers, dense: list[torch.Size]) -> DryRun:
    """Decide where original positions are restored, and check the model with fewer tokens.

    Args:
        state: The patch, not installed yet.
        consumers: The consumers of its blocks' outputs.
        dense: Shapes of the unpatched model's output tensors.

    Returns:
        The dry run of the final plan.

    Raises:
        InvalidOption: The model cannot carry fewer tokens.
    """
    assert state.tokens is not None
    if state.shortens:
        _let_restore(state, state.tokens, consumers)
    try:
        run = dry_run(state, counted=False)
        complete = not state.shortens or run.output == dense
    except ProbeFailed as error:
        if not state.shortens or state.tokens.restore is None:
            raise _cannot(state, error) from error
        complete = False
    if not complete:  # there is a consumer that tracing did not find
        for block in state.blocks:
            block.restores = True
        run = _run_restored(state)
    _check_counts(state, run)
    return run


def _run_restored(state: PatchState) -> DryRun:
    try:
        return dry_run(state, counted=False)
    except ProbeFailed as error:
        raise _cannot(state, error) from error


def _cannot(state: PatchState, error: ProbeFailed) -> InvalidOption:
    return InvalidOption(
        f"{type(state.model).__name__} cannot carry fewer tokens through these blocks ({error}); "
        "use an attention strategy such as 'connectivity', or other layers="
    )


def _let_restore(state: PatchState, tokens: TokenStrategy, consumers: Consumers) -> None:
    """Let blocks restore original positions if a consumer reads their output by position.

    They also do so if pooling would weigh merged (or padded) tokens incorrectly.
    """
    uneven = tokens.merges() or tokens.is_ragged()
    for block in state.blocks:
        asked = tokens.restore not in ("auto", None) and block.last
        block.restores = asked or consumers.need_all(block.index, uneven)
        if block.restores and tokens.restore is None:
            raise InvalidOption(
                f"{type(state.model).__name__} returns (or reads) {_reads(consumers, block)}, but "
                "restore=None never restores tokens: use restore='auto'"
            )


def _reads(consumers: Consumers, block: BlockRuntime) -> str:
    reason = consumers.positions.get(block.index)
    if reason is None:
        return "the mean of patches, in which merged (or fewer) tokens would be weighted wrongly"
    return f"one feature for each patch after {block.block.name} ({reason})"


def _check_counts(state: PatchState, run: DryRun) -> None:
    """Check the number of tokens that reaches each block with the block's strategy."""
    by_index = {block.index: block for block in state.blocks}
    for i, (index, counts) in enumerate(sorted(run.counts.items())):
        block = by_index[index]
        assert block.strategy is not None
        try:
            for turn, count in enumerate(counts):
                block.strategy.check(count, first=i == turn == 0)
        except SparsiattnError as error:
            raise type(error)(f"block {block.block.name!r}: {error}") from None
