"""Looking for a model's attention in a copy without data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.given_structure import GivenStructure
from sparsiattn.attention.layout import Layout
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, NothingToPatch
from sparsiattn.patching.discovery.backbone import Backbone, backbone_named, backbone_of
from sparsiattn.patching.discovery.meta_model import MetaInputs, meta_copy
from sparsiattn.patching.discovery.probe import AttentionCall, probe
from sparsiattn.runtime.patch_state import ModelAttention, PatchState

_SQUARE = (1, 3, 1, 1)


@dataclass(frozen=True)
class ModelSurvey:
    """What a dry run of a copy without data says about a model.

    Attributes:
        backbone: The adapter.
        shape: Shape of one image.
        meta_model: The copy.
        calls: Every call of attention.
        sites: Those that can be patched, with the layout of their host.
        skipped: ``(name, reason)`` of the others.
        returned: Shapes of what the model returned.
        given: What the user said of the model's sequences.
        entrances: As in `Probe`.
    """

    backbone: Backbone
    shape: tuple[int, ...]
    meta_model: nn.Module
    calls: list[AttentionCall]
    sites: list[tuple[Site, Layout]]
    skipped: list[tuple[str, str]]
    returned: list[torch.Size]
    given: GivenStructure | None = None
    entrances: tuple[str, ...] = ()

    def attention(self, model: nn.Module) -> ModelAttention:
        """What a patch keeps of it.

        Raises:
            NothingToPatch: The model has no site.
        """
        if not self.sites:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped)
            raise NothingToPatch(
                f"{type(model).__name__} has no attention to patch: no module of it calls scaled "
                "dot product attention (or writes it out) in a way that can be served" + reasons
            )
        tokens = next((call.map for call in self.calls if call.map is not None), None)
        return ModelAttention(
            self.backbone.name,
            self.shape,
            tuple(self.sites),
            tuple(self.skipped),
            unread=frozenset(call.name for call in self.calls if call.weights == "ignored"),
            lifted=frozenset(call.name for call in self.calls if call.lifted),
            map_module=None if tokens is None else tokens.name,
            entrances=self.entrances,
            map_size=(self.shape[-2], self.shape[-1]) if tokens is None else tokens.size,
        )


def survey(
    model: nn.Module,
    example: Any,
    names: Collection[str] = (),
    inputs: MetaInputs | None = None,
    given: GivenStructure | None = None,
) -> ModelSurvey:
    """Look for attention in a copy of the model; finding none is no error here.

    Args:
        model: The model.
        example: Shape of one image, or a tensor; None for what the model says.
        names: Sites that are wanted even where nothing can be saved.
        inputs: What to call the copy with, where that is not, or not only, an image; then the
            model need not say how large its images are.
        given: What the user says of the model's sequences.

    Raises:
        InvalidOption: That does not fit.
    """
    backbone = backbone_of(model)
    if inputs is None or example is not None:
        shape = _input_shape(model, backbone, example)
    else:
        shape = backbone.input_shape(model) or _SQUARE
    meta_model = meta_copy(model)
    for override in backbone.attribute_overrides(meta_model):
        override.apply()
    run = probe(meta_model, inputs or backbone.meta_inputs(meta_model, shape))
    rows, columns = backbone.patch_size(model)
    aspect = shape[-2] * columns / (shape[-1] * rows)
    sites, skipped = backbone.sites(run.calls, aspect, names)
    skipped += run.softmaxes
    if given is not None:
        sites = _with_structure(sites, given)
    return ModelSurvey(
        backbone,
        shape,
        meta_model,
        run.calls,
        sites,
        skipped,
        run.returned,
        given=given,
        entrances=run.entrances,
    )


def _with_structure(
    sites: list[tuple[Site, Layout]], given: GivenStructure
) -> list[tuple[Site, Layout]]:
    """The sites as the user describes them; another size stays where pixels tell it."""
    described, misfit, fitting = [], None, 0
    for site, layout in sites:
        assert site.structure is not None
        try:
            structure = given.applied(site.structure, site.tokens, site.name)
        except InvalidOption as error:
            if site.is_guess:
                raise
            misfit = misfit or error
        else:
            fitting += 1
            site = site.described(structure)
        described.append((site, layout))
    if misfit is not None and not fitting:
        raise misfit
    return described


def refresh(state: PatchState) -> None:
    """Describe the sites anew if the model was set to another input size since."""
    model, size = state.model, backbone_named(state.backbone).input_shape(state.model)
    if state.follows_model and size != state.input_shape:
        names = {site.name for site in state.sites}
        state.describe_anew(survey(model, None, names, given=state.structure).attention(model))


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
