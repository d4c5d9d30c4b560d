"""Towers: the separate stacks of blocks of a model, each with its own sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparsiattn.attention.block import Block
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.discovery.backbone import Backbone
from sparsiattn.patching.discovery.consumers import BlockRun, Consumers, find_consumers
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.patching.token_blocks import row_sites
from sparsiattn.strategies.token_base import TokenStrategy


@dataclass
class Tower:
    """Blocks that process the same sequence, one after the other.

    Attributes:
        start: Index of its first block among all blocks of the model.
        blocks: Its blocks, in order.
        root: Path of the module that contains this tower and no other.
        repeated: Whether blocks take the sequence more than once.
    """

    start: int
    blocks: list[Block]
    root: str = ""
    repeated: bool = False


def consumers_of(
    meta_model: nn.Module, blocks: Sequence[Block], sites: Mapping[str, Site], inputs: MetaInputs
) -> Consumers:
    """The consumers of these blocks' outputs; see `find_consumers`."""
    lead = [sites[block.sites[0]].leading_tokens for block in blocks]
    several = [block.input_shape[0] > 1 for block in blocks]
    names = [block.name for block in blocks]
    return find_consumers(meta_model, names, lead, inputs, several=several)


def find_towers(blocks: list[Block], consumers: Consumers, model: str) -> list[Tower]:
    """The towers of a model, in the order in which they run.

    Raises:
        InvalidOption: Blocks do not simply follow one another.
    """
    towers: list[Tower] = []
    seen: dict[int, Tower] = {}
    for run in consumers.runs:
        name = blocks[run.block].name
        before = None if run.before is None else consumers.runs[run.before]
        if run.block in seen:
            _repeat(seen[run.block], run, before, seen, name, model)
        elif before is None:
            towers.append(Tower(run.block, [blocks[run.block]]))
            seen[run.block] = towers[-1]
        elif before.block != run.block - 1 or seen[before.block] is not towers[-1]:
            raise _tangled(model, name, blocks[before.block].name)
        else:
            towers[-1].blocks.append(blocks[run.block])
            seen[run.block] = towers[-1]
    if len(towers) > 1:
        for tower in towers:
            tower.root = _root(tower, towers)
    return towers


def _repeat(
    tower: Tower,
    run: BlockRun,
    before: BlockRun | None,
    seen: dict[int, Tower],
    name: str,
    model: str,
) -> None:
    """Handle a block that has run before: on a new sequence, or again on the same one."""
    if before is None:
        return
    if seen[before.block] is not tower:
        raise _tangled(model, name, tower.blocks[0].name)
    again = before.block != run.block - 1
    tower.repeated |= again
    if again and not run.handed:
        raise InvalidOption(
            f"{model} runs block {name!r} more than once and changes the tokens in between, so the "
            "remaining tokens could not be tracked; use an attention strategy such as "
            "'connectivity'"
        )


def _tangled(model: str, name: str, before: str) -> InvalidOption:
    return InvalidOption(
        f"{model}: block {name!r} takes the output of {before!r}, which is not the previous block "
        "(interleaved towers, or branches); patch a part of the model on its own, or use an "
        "attention strategy such as 'connectivity'"
    )


def _root(tower: Tower, towers: Sequence[Tower]) -> str:
    """The shortest path that contains this tower and no other."""
    path: list[str] = []
    others = [b.name.split(".") for other in towers if other is not tower for b in other.blocks]
    for parts in zip(*(block.name.split(".") for block in tower.blocks), strict=False):
        path.append(parts[0])
        if len(set(parts)) > 1 or not any(name[: len(path)] == path for name in others):
            break
    return ".".join(path)


def class_tokens_of(
    backbone: Backbone, model: nn.Module, tower: Tower, sites: Mapping[str, Site]
) -> int:
    """Number of class tokens at the start of a tower's sequences."""
    rows = filter(None, row_sites(tower.blocks, sites))
    prefix = min((site.prefix_tokens for site in rows), default=0)
    return min(backbone.class_tokens(model.get_submodule(tower.root)), prefix)


def check_alike(towers: Sequence[Tower], resolved: Sequence[TokenStrategy], model: str) -> None:
    """Check that one config, which patches all towers, has the same meaning in each of them.

    Raises:
        InvalidOption: It has not.
    """
    if all(config == resolved[0] for config in resolved[1:]):
        return
    roots = ", ".join(f"patch(model.{tower.root})" for tower in towers)
    depths = ", ".join(str(len(tower.blocks)) for tower in towers)
    raise InvalidOption(
        f"{model} has {len(towers)} towers of {depths} blocks, in which these options have "
        f"different meanings; patch each tower on its own: {roots}"
    )
