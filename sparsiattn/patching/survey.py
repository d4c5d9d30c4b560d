"""Surveys a model's attention in a copy of it, on the meta device unless the model needs data."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.example import Example
from sparsiattn.attention.given_structure import GivenStructure
from sparsiattn.attention.layout import Layout
from sparsiattn.attention.packing import PackedInput
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, NothingToPatch, ProbeFailed, SparsiattnError
from sparsiattn.patching.discovery.backbone import Backbone, backbone_named, backbone_of
from sparsiattn.patching.discovery.example_input import (
    SQUARE,
    inputs_of,
    read_examples,
    without_data,
)
from sparsiattn.patching.discovery.meta_model import (
    MetaInputs,
    has_data,
    meta_copy,
    value_copy,
)
from sparsiattn.patching.discovery.packed import packing_of, with_packed_images
from sparsiattn.patching.discovery.probe import AttentionCall, MapSource, probe
from sparsiattn.patching.flop_counter import MacTally
from sparsiattn.runtime.patch_state import ModelAttention, PatchState


@dataclass(frozen=True)
class ModelSurvey:
    """The result of a dry run of a model's copy.

    Attributes:
        backbone: The adapter.
        example: The input of the dry run.
        meta_model: The copy, on the meta device unless the model needs data.
        calls: Every call of attention.
        sites: Calls that can be patched, with the layout of their host.
        skipped: ``(name, reason)`` of the other calls.
        returned: Shapes of the model's output tensors.
        read_by_hooks: Names of modules whose tensors the host's own hooks use.
        given: The layout of the model's sequences as the user gave it.
        entrances: As in `Probe`.
        macs: Multiply-accumulates of the dense model for one image; None if not all are known.
        packed: How the model takes several images as one sequence; None if it does not, or if the
            order of their patches is not known.
    """

    backbone: Backbone
    example: Example
    meta_model: nn.Module
    calls: list[AttentionCall]
    sites: list[tuple[Site, Layout]]
    skipped: list[tuple[str, str]]
    returned: list[torch.Size]
    read_by_hooks: frozenset[str] = frozenset()
    given: GivenStructure | None = None
    entrances: tuple[str, ...] = ()
    macs: int | None = None
    packed: PackedInput | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image; without an image, of the first tensor."""
        return self.example.shape

    @property
    def map_module(self) -> str | None:
        """Path of the convolution that makes tokens; None if there is none."""
        source = self._map_source
        return None if source is None else source.name

    @property
    def _map_source(self) -> MapSource | None:
        return next((call.map for call in self.calls if call.map is not None), None)

    def inputs(self) -> MetaInputs:
        """The inputs of the copy."""
        return inputs_of(self.example, self.meta_model, self.backbone)

    def attention(self, model: nn.Module) -> ModelAttention:
        """The part of the survey that a patch keeps.

        Raises:
            NothingToPatch: The model has no site.
        """
        if not self.sites:
            reasons = "".join(f"\n  {name or '(root)'}: {reason}" for name, reason in self.skipped)
            raise NothingToPatch(
                f"{type(model).__name__} has no attention to patch: none of its modules computes "
                "scaled dot product attention in a way that is supported" + reasons
            )
        tokens = self._map_source
        return ModelAttention(
            self.backbone.name,
            without_data(self.example),
            tuple(self.sites),
            tuple(self.skipped),
            unread=frozenset(call.name for call in self.calls if call.weights == "ignored"),
            lifted=frozenset(call.name for call in self.calls if call.lifted),
            sums_bias=frozenset(call.name for call in self.calls if call.sums_bias),
            map_module=self.map_module,
            entrances=self.entrances,
            macs=self.macs,
            packed=self.packed,
            map_size=(self.shape[-2], self.shape[-1]) if tokens is None else tokens.size,
        )


def survey(
    model: nn.Module,
    example: Any,
    names: Collection[str] = (),
    inputs: MetaInputs | None = None,
    given: GivenStructure | None = None,
) -> ModelSurvey:
    """Find the attention of a model in a copy of it; finding none is not an error here.

    The copy is on the meta device. If the model does not run like that (it reads values, or has
    operators without shape inference), the copy shares the model's weights and runs once with the
    example, or with a random image of that shape. The model itself does not change.

    Args:
        model: The model.
        example: The ``input`` of `patch`.
        names: Sites to include even if nothing can be saved there.
        inputs: Arguments for the copy if they are not just an image; the model then need not state
            the size of its images.
        given: The layout of the model's sequences as the user gave it.

    Raises:
        InvalidOption: The given layout does not fit the model.
        ProbeFailed: The copy runs neither on the meta device nor with values.
    """
    backbone = backbone_of(model)
    if inputs is None:
        examples = read_examples(model, backbone, example)
    elif example is None:
        examples = [Example(backbone.input_shape(model) or SQUARE, inputs)]
    else:
        examples = [replace(e, arguments=inputs) for e in read_examples(model, backbone, example)]
    if has_data(model):
        examples += [replace(example, with_values=True) for example in examples]
    failures = []
    for attempt in examples:
        try:
            return _survey_with(model, backbone, attempt, names, given)
        except ProbeFailed as error:
            failures.append(error)
    advice = _advice(model, is_given=example is not None or inputs is not None)
    raise ProbeFailed(f"{failures[-1]}. {advice}") from failures[-1].__cause__


def survey_again(state: PatchState, names: Collection[str]) -> ModelSurvey:
    """Survey a patched model again, with the example of patch time."""
    backbone = backbone_of(state.model)
    return _survey_with(state.model, backbone, state.attention.example, names, state.structure)


def _survey_with(
    model: nn.Module,
    backbone: Backbone,
    example: Example,
    names: Collection[str] = (),
    given: GivenStructure | None = None,
) -> ModelSurvey:
    copied = value_copy(model) if example.with_values else meta_copy(model)
    for override in backbone.attribute_overrides(copied):
        override.apply()
    tally = MacTally(strict=False)
    packed = backbone.packed_input(copied)
    run = probe(copied, inputs_of(example, copied, backbone), tally, packed)
    if run.packing is None and packed is not None and example.arguments is not None:
        run = replace(run, packing=packing_of(packed, copied, example.arguments))
    packed, calls = with_packed_images(packed, run)
    sites, skipped = backbone.sites(calls, _aspect(model, backbone, example.shape), names)
    skipped += run.softmaxes
    if given is not None:
        sites = _with_structure(sites, given)
    return ModelSurvey(
        backbone,
        example,
        copied,
        calls,
        sites,
        skipped,
        run.returned,
        run.read_by_hooks,
        given=given,
        entrances=run.entrances,
        macs=tally.macs,
        packed=packed,
    )


def _aspect(model: nn.Module, backbone: Backbone, shape: tuple[int, ...]) -> float:
    """Height over width of the image, in patches; 1 without an image."""
    if len(shape) < 4:
        return 1.0
    rows, columns = backbone.patch_size(model)
    return shape[-2] * columns / (shape[-1] * rows)


def _with_structure(
    sites: list[tuple[Site, Layout]], given: GivenStructure
) -> list[tuple[Site, Layout]]:
    """The sites with the layout that the user gave, where it fits; else unchanged.

    Raises:
        InvalidOption: It fits none of the sites.
    """
    described, misfit, fitting = [], None, 0
    for site, layout in sites:
        assert site.structure is not None
        try:
            structure = given.applied(site.structure, site.tokens, site.name)
        except InvalidOption as error:  # queries of a decoder: their structure stays a guess
            misfit = misfit or error
        else:
            fitting += 1
            site = site.described(structure)
        described.append((site, layout))
    if misfit is not None and not fitting:
        raise misfit
    return described


def refresh(state: PatchState) -> None:
    """Update the descriptions of sites if the model's input size has changed."""
    model, size = state.model, backbone_named(state.backbone).input_shape(state.model)
    if state.follows_model and size != state.input_shape:
        names = {site.name for site in state.sites}
        state.describe_anew(survey(model, None, names, given=state.structure).attention(model))


def _advice(model: nn.Module, is_given: bool) -> str:
    """Advice for a model that does not run in the dry run."""
    parts = [name for name, part in _image_parts(model) if _has_sites(part)]
    if parts:
        calls = " or ".join(f"sparsiattn.patch(model.{name}, ...)" for name in parts)
        return f"Patch the part that takes images: {calls}"
    if is_given:
        return (
            "The model does not run with this input=, which must be the shape of an image, or an "
            "example (a tensor, a dict of keyword arguments, a tuple) that model(...) accepts"
        )
    return (
        "Pass input=(1, channels, height, width), or an example (a tensor, a dict of keyword "
        "arguments, a tuple) that the model accepts"
    )


def _image_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost parts that state the size of their images, by name."""
    outermost: list[str] = []
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in outermost)
        if name and not inside and backbone_of(part).input_shape(part) is not None:
            outermost.append(name)
            yield name, part


def _has_sites(part: nn.Module) -> bool:
    backbone = backbone_of(part)
    try:
        example = Example(backbone.input_shape(part) or SQUARE)
        return bool(_survey_with(part, backbone, example).sites)
    except SparsiattnError:
        return False
