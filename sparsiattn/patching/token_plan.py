"""What a token strategy does to a model, worked out at patch time: which blocks reduce, where in
the block, and what the model can honour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.discovery.blocks import Block, find_blocks
from sparsiattn.patching.schedule import token_budgets
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.strategies.token_base import TokenStrategy


def carry(
    handle: Any, meta_model: nn.Module, tokens: TokenStrategy, schedule: dict[str, Any]
) -> None:
    """Give the handle the blocks of its model and what each of them does."""
    sites = {site.name: site for site in handle.found}
    backbone = REGISTRY.get("backbones", handle.backbone)
    blocks = find_blocks(meta_model, sites, backbone.meta_inputs(handle.model, handle.input_shape))
    model = type(handle.model).__name__
    if not blocks:
        raise InvalidOption(
            f"{model} has no blocks that tokens could skip: token strategies need modules that "
            "hold attention and an MLP; use an attention strategy, e.g. 'connectivity'"
        )
    if backbone.packs_batch(handle.model):
        raise InvalidOption(
            f"{model} lays the images of a batch end to end in one sequence, where tokens of one "
            "would be chosen at the cost of another; use an attention strategy, e.g. 'connectivity'"
        )
    plain = is_plain(blocks, sites)
    class_tokens = backbone.class_tokens(handle.model) if plain else 0
    tokens = tokens.for_model(class_tokens, not plain, model)
    if not plain:
        check_hierarchy(tokens, model, blocks)
    tokens, resolved = _resolve(tokens, blocks, sites, schedule)
    handle.tokens = tokens
    handle.proportional = tokens.proportional_attention()
    for index, block in enumerate(blocks):
        site = sites[block.sites[0]]
        runtime = BlockRuntime(block, site, index, len(blocks), handle, class_tokens)
        if index in resolved:
            runtime.strategy = resolved[index]
            runtime.planner = _planner(runtime, handle.model)
            runtime.place = _place(runtime.strategy, block, plain, model)
        handle.blocks.append(runtime)
    _trim(handle, plain)


def is_plain(blocks: Sequence[Block], sites: dict[str, Site]) -> bool:
    """Whether one sequence ``[B, N, C]`` runs through all blocks, every token attending to all."""
    shapes = {shape for block in blocks for shape in (block.taken, block.given)}
    whole = all(
        site.windows == 1 and site.tokens == site.keys == blocks[0].taken[-2]
        for block in blocks
        for site in (sites[name] for name in block.sites)
    )
    return len(shapes) == 1 and len(blocks[0].taken) == 3 and whole


def check_hierarchy(tokens: TokenStrategy, model: str, blocks: list[Block]) -> None:
    """In windows and stages the grid must stay: only the MLP can be spared."""
    if blocks[0].taken[0] != 1:
        raise InvalidOption(
            f"{model} hands tokens from block to block in another form than [B, N, C] (for one "
            f"image: {list(blocks[0].taken)}), which token strategies cannot make shorter; use an "
            "attention strategy such as 'connectivity'"
        )
    if not (tokens.reads_attention() or tokens.is_ragged() or tokens.merges()):
        return
    raise InvalidOption(
        f"{model} attends in windows or changes its grid between stages, so every token must stay; "
        f"{tokens.name!r} with these options cannot be honoured there. What can: dropped tokens "
        "skip the MLP only, with token_drop and score='norm', 'random' or 'learned' (and a fixed "
        "keep), or an attention strategy such as 'connectivity'"
    )


def _resolve(
    tokens: TokenStrategy, blocks: list[Block], sites: dict[str, Site], schedule: dict[str, Any]
) -> tuple[TokenStrategy, dict[int, TokenStrategy]]:
    """The config as JSON will hold it, and one for each reducing block."""
    tokens = token_budgets(schedule, tokens, [block.name for block in blocks])
    layers = tokens.layers_in(len(blocks))
    one = {
        layer: tokens.resolve_for(sites[blocks[layer].sites[0]], i, len(layers))
        for i, layer in enumerate(layers)
    }
    lists: dict[str, Any] = {
        name: [getattr(config, name) for config in one.values()]
        for name in tokens.per_layer
        if callable(getattr(tokens, name, None))
    }
    return replace(tokens, layers=layers, **lists), one


def _place(tokens: TokenStrategy, block: Block, plain: bool, model: str) -> str:
    if not plain:
        if block.tail is None or block.tail.mixes:
            why = (
                "no MLP branch of its own"
                if block.tail is None
                else (f"an MLP that mixes tokens ({block.tail.mixes})")
            )
            raise InvalidOption(
                f"{model}: block {block.name!r} has {why}, so no token can skip it; use an "
                "attention strategy such as 'connectivity', or other layers="
            )
        return "bypass"
    place = tokens.placement()
    return "exit" if place == "middle" and block.tail is None else place


def _planner(runtime: BlockRuntime, model: nn.Module) -> Any:
    assert runtime.strategy is not None
    with torch.inference_mode(False):
        planner = runtime.strategy.planner(runtime.site, runtime.block.given[-1])
        if isinstance(planner, nn.Module):
            like = next(model.get_submodule(runtime.block.name).parameters(), None)
            if like is not None:
                dtype = like.dtype if like.is_floating_point() else None
                planner.to(device=like.device, dtype=dtype)
            planner.train(model.training)
    return planner


def _trim(handle: Any, plain: bool) -> None:
    """Hooks are needed from the first reduction on; in a hierarchy, to the end of its stage."""
    blocks: list[BlockRuntime] = handle.blocks
    start = next(i for i, runtime in enumerate(blocks) if runtime.place)
    blocks[start].first = True
    blocks[-1].last = True
    del blocks[:start]
    if plain:
        return
    for before, runtime in pairwise(blocks):
        block = runtime.block
        same = block.after and before.block.given == block.taken == block.given
        if (
            runtime.place is None
            and same
            and before.place
            and not (block.tail is None or block.tail.mixes)
        ):
            runtime.place = "bypass"
        runtime.first = not same or before.place is None
    handle.blocks = [runtime for runtime in blocks if runtime.place]
