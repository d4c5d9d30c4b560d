"""Where a model's attention, its projections and its MLPs are, for one input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.analysis.inspection import bare
from sparsiattn.analysis.profiling.meter import ATTENTION, MLP, Section
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType, ProbeFailed
from sparsiattn.patching.discovery.blocks import find_blocks
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.runtime.site_runtime import SiteRuntime

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class ModuleMap:
    """sites: in the order they run. attention: by the path of a module that holds attention and its
    projections, the sites in it. blocks: by path, the first site of each block around them."""

    backbone: str
    sites: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...]
    attention: dict[str, tuple[str, ...]]
    blocks: dict[str, str]

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Module paths and what to put down to them."""
        for path, inside in self.attention.items():
            yield path, (ATTENTION, inside[0])
        for path, first in self.blocks.items():
            if path not in self.attention:
                yield path, (MLP, first)


def anatomy(model: nn.Module, live: list[Patch], given: MetaInputs) -> ModuleMap:
    """From a dry run of a copy without patches, at the shapes of this input."""
    wanted = set(patched_sites(model, live))
    seen, inputs = _survey(bare(model, live), _example(model, live, given), wanted, given)
    names = [site.name for site, _ in seen.sites]
    blocks: dict[str, str] = {}
    attention: dict[str, tuple[str, ...]] = {}
    inside: set[str] = set()
    for block in find_blocks(seen.meta_model, names, inputs) if names else ():
        blocks[block.name] = block.sites[0]
        inside.update(block.sites)
        for name in block.sites:
            child = _child(seen.meta_model, block.name, name)
            attention[child] = (*attention.get(child, ()), name)
    attention |= {name: (name,) for name in names if name not in inside}
    sites = tuple(site for site, _ in seen.sites)
    return ModuleMap(seen.backbone.name, sites, tuple(seen.skipped), attention, blocks)


def patched_sites(model: nn.Module, live: list[Patch]) -> dict[str, SiteRuntime]:
    """Sites that patches of the model, of its parts or of what it is a part of hold, by their path
    in it."""
    paths = {id(module): name for name, module in model.named_modules()}
    runtimes = [runtime for patch in live for runtime in patch.runtimes]
    return {paths[id(one.module)]: one for one in runtimes if id(one.module) in paths}


def _survey(
    meta_model: nn.Module, example: Any, wanted: set[str], given: MetaInputs
) -> tuple[ModelSurvey, MetaInputs]:
    """Sites of the model called as it will be, else, where that needs values, as its adapter knows
    to call it."""
    inputs = _dry(given)
    try:
        return survey(meta_model, example, wanted, inputs), inputs
    except ProbeFailed:
        seen = survey(meta_model, example, wanted)
        return seen, seen.backbone.meta_inputs(meta_model, seen.shape)


def _example(model: nn.Module, live: list[Patch], given: MetaInputs) -> Any:
    image = batch_of(given)
    if image.dim() == 4:
        return image
    told = [patch for patch in live if patch.model is model and not patch.follows_model]
    return told[0].input_shape if told else None


def _child(model: nn.Module, block: str, site: str) -> str:
    """The part of a block that holds this site: attention with its projections."""
    path = block
    for name in site[len(block) + 1 :].split(".") if site != block else ():
        path = f"{path}.{name}" if path else name
        if not isinstance(model.get_submodule(path), _CONTAINERS):
            break
    return path


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def batch_of(given: MetaInputs) -> Tensor:
    """The images among a model's arguments: the first tensor ``[B, C, H, W]``, else the first with
    more than one axis."""
    tensors = [x for x in _tensors(given) if x.dim() > 1]
    found = next((x for x in tensors if x.dim() == 4 and x.is_floating_point()), None)
    found = next(iter(tensors), None) if found is None else found
    if found is None:
        raise InvalidType(
            "profile needs what the model takes, with at least one tensor [B, ...] in it: images "
            f"[B, C, H, W], as torch.randn(1, 3, 224, 224); got {given[0] or given[1]!r}"
        )
    if not len(found):
        raise InvalidOption(
            f"profile needs at least one image, got a tensor of shape {tuple(found.shape)}"
        )
    return found


def _dry(given: MetaInputs) -> MetaInputs:
    """One image of these arguments, without data."""
    batch = len(batch_of(given))

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = value[:1] if value.dim() and len(value) == batch else value
            return torch.empty_like(whole, device="meta", requires_grad=False)
        if isinstance(value, dict):
            return {name: one(item) for name, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(one(item) for item in value)
        return value

    args, kwargs = given
    return tuple(one(value) for value in args), {name: one(x) for name, x in kwargs.items()}
