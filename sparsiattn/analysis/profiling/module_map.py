"""Find the attention, projections and MLPs of a model for one input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparsiattn.analysis.profiling.meter import ATTENTION, MLP, Section
from sparsiattn.analysis.unpatched import example_input, survey_unpatched
from sparsiattn.attention import Site
from sparsiattn.errors import InvalidOption, InvalidType, ProbeFailed
from sparsiattn.patching import MetaInputs, Patch
from sparsiattn.patching.discovery.blocks import find_blocks
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.runtime.site_runtime import SiteRuntime

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class ModuleMap:
    """The modules whose costs are counted separately.

    Attributes:
        backbone: Name of the adapter for the model.
        sites: The sites in order of execution.
        attention: Names of sites by the path of the module that contains them and their
            projections.
        blocks: Name of the first site of each block, by the path of the block.
    """

    backbone: str
    sites: tuple[Site, ...]
    attention: dict[str, tuple[str, ...]]
    blocks: dict[str, str]

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Yield module paths and their sections."""
        for path, sites in self.attention.items():
            yield path, (ATTENTION, sites[0])
        for path, site in self.blocks.items():
            if path not in self.attention:
                yield path, (MLP, site)


def map_modules(model: nn.Module, patches: list[Patch], arguments: MetaInputs) -> ModuleMap:
    """Find the modules by a dry run of a copy without patches, at the shapes of this input."""
    image = batch_of(arguments)
    example = example_input(model, image if image.dim() == 4 else None, patches)
    patched = set(patched_sites(model, patches))
    _, surveyed = survey_unpatched(
        model, patches, lambda copied: _survey(copied, example, patched, arguments)
    )
    sites = tuple(site for site, _ in surveyed.sites)
    names = [site.name for site in sites]
    blocks = find_blocks(surveyed.meta_model, names, surveyed.inputs()) if names else []
    attention: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        for name in block.sites:
            child = _child(surveyed.meta_model, block.name, name)
            attention[child] = (*attention.get(child, ()), name)
    in_blocks = {name for block in blocks for name in block.sites}
    attention |= {name: (name,) for name in names if name not in in_blocks}
    first_sites = {block.name: block.sites[0] for block in blocks}
    return ModuleMap(surveyed.backbone.name, sites, attention, first_sites)


def patched_sites(model: nn.Module, patches: list[Patch]) -> dict[str, SiteRuntime]:
    """Patched sites by their path in the model; the patch may belong to a larger model."""
    paths = {id(module): path for path, module in model.named_modules()}
    runtimes = (runtime for patch in patches for runtime in patch.runtimes)
    return {paths[id(r.module)]: r for r in runtimes if id(r.module) in paths}


def _survey(
    copied: nn.Module, example: Any, patched: set[str], arguments: MetaInputs
) -> ModelSurvey:
    """The sites of the model, called with these arguments.

    If the model needs the values of its arguments, its adapter's default call is used instead.
    """
    try:
        return survey(copied, example, patched, _one_image(arguments))
    except ProbeFailed:
        return survey(copied, example, patched)


def _child(model: nn.Module, block: str, site: str) -> str:
    """Path of the block's submodule that contains a site: attention with its projections."""
    path = block
    for name in site[len(block) + 1 :].split(".") if site != block else ():
        path = f"{path}.{name}" if path else name
        if not isinstance(model.get_submodule(path), _CONTAINERS):
            break
    return path


def batch_of(arguments: MetaInputs) -> Tensor:
    """The images among a model's arguments.

    Returns:
        The first floating-point tensor ``[B, C, H, W]``, else the first tensor with more than one
        axis.

    Raises:
        InvalidType: There is no such tensor.
        InvalidOption: The tensor is empty.
    """
    tensors = [x for x in tensors_in(arguments) if x.dim() > 1]
    images = [x for x in tensors if x.dim() == 4 and x.is_floating_point()]
    batch = next(iter(images + tensors), None)
    if batch is None:
        raise InvalidType(
            "profile needs the model's input with at least one tensor [B, ...], such as images "
            f"torch.randn(1, 3, 224, 224); got {arguments[0] or arguments[1]!r}"
        )
    if not len(batch):
        raise InvalidOption(
            f"profile needs at least one image, got a tensor of shape {tuple(batch.shape)}"
        )
    return batch


def _one_image(arguments: MetaInputs) -> MetaInputs:
    """The arguments with only the first image."""
    batch = len(batch_of(arguments))

    def first_image(tensor: Tensor) -> Tensor:
        return tensor.detach()[:1] if tensor.dim() and len(tensor) == batch else tensor.detach()

    return tree_map_only(Tensor, first_image, arguments)  # type: ignore[no-any-return]
