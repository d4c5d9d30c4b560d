"""`recommend`: time settings in turn with the dense model, and pick one that meets the goal."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.analysis.recommendation.choice import Goal
from sparsiattn.analysis.recommendation.clock import Clock, shown
from sparsiattn.analysis.recommendation.contenders import Runner, weights_shared
from sparsiattn.analysis.recommendation.images import (
    check_size,
    fitting_size,
    in_batches,
    read_images,
)
from sparsiattn.analysis.recommendation.result import Recommendation
from sparsiattn.analysis.recommendation.searching import Search
from sparsiattn.errors import AlreadyPatched, DataError, first_line
from sparsiattn.patching.discovery.backbone import backbone_of
from sparsiattn.patching.model_outputs import Metric, OutputMetric
from sparsiattn.patching.survey import survey
from sparsiattn.patching.text import shape_text
from sparsiattn.runtime import timing
from sparsiattn.runtime.patch_state import live_patches, unwrap
from sparsiattn.training.progress import Progress


def recommend(
    model: nn.Module,
    images: Any,
    *,
    speedup: float | None = None,
    quality: float | None = None,
    metric: Metric | None = None,
    budget_s: float = 60.0,
    batch_size: int | None = None,
    progress: bool | Progress = True,
) -> Recommendation:
    """Find the setting of `patch` that meets a goal for a model, on this machine and these images.

    No labels are needed: patched outputs are compared with the dense model's. Settings run in pairs
    with the dense model, a few at first and more where the goal is near. Copies that share the
    weights run; the model itself is not touched.

    With ``speedup`` the setting of best quality among those fast enough is picked, with ``quality``
    alone the fastest of those good enough. With both, ``quality`` says whether the first of these
    is good enough. Where no setting is, the closest is picked, and ``met`` is False.

    Args:
        model: Not patched. It is measured in eval mode, as it is without `torch.compile`.
        images: A batch ``[B, C, H, W]`` as the model takes it (or of videos or views, with one
            more axis), or a loader of batches, alone or with labels; up to 256 images are read.
        speedup: The least time of the dense model over that of the patched one, as 1.5.
        quality: The least share of answers kept (models with a head), or the least mean cosine of
            features (headless ones), as 0.99.
        metric: ``"classes"`` (answers kept), ``"features"`` (cosine), or a function of the dense
            and the patched output that gives a number or one for each image, 1 where nothing
            changed; None to ask the model, and the result names it.
        budget_s: Seconds to take at most, about: one more measurement may end after them.
        batch_size: Images of a forward pass; None for as many as let some hundred passes fit into
            the budget.
        progress: Show on stderr how much time is left; or a function, called with the seconds gone
            and those there are.

    Returns:
        The setting as a line of code, and all that was measured.

    Raises:
        InvalidOption: No goal is given, or an argument is out of range.
        AlreadyPatched: The model, or a part of it, carries a patch.
        NothingToPatch: The model has no attention that can be reached.
        DataError: There are no images, or the model does not take them, or outputs cannot be
            compared.

    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> found = recommend(tiny_vit(), tiny_images(8), quality=0.5, budget_s=0.5, progress=False)
    >>> found.metric, found.input_shape[1:], len(found.table) > 0
    ('classes', (3, 32, 32), True)
    """
    goal, batch_size = Goal(speedup, quality), check_size(batch_size)
    Clock(budget_s)  # refuses a wrong budget before anything is shown
    host = unwrap(model)
    for _, patch in live_patches(host):
        raise AlreadyPatched(
            f"recommend needs a model without a patch; this one carries {patch!r}: "
            "call unpatch() on it first"
        )
    with shown(progress, budget_s) as show:
        clock = Clock(budget_s, show)
        clock.tell("reading images")
        read, given = read_images(images, host, lambda: clock.left > 0.8 * budget_s)
        clock.tell("looking at the model")
        runner = _runner(host, read, metric, clock, batch_size, given)
        try:
            found = Search(runner, goal).run()
        finally:
            runner.close()
    notes = ["measured as it is without torch.compile and parallel wrappers"] * (host is not model)
    if batch_size is None and (size := len(runner.batches[0])) < given:
        notes.append(
            f"timed {size} at a time, to fit the budget; batch_size={given} times as given"
        )
    return replace(found, notes=(*found.notes, *notes))


def _runner(
    host: nn.Module,
    images: Tensor,
    metric: Metric | None,
    clock: Clock,
    batch_size: int | None,
    given: int,
) -> Runner:
    """What runs the dense model and others beside it.

    Args:
        host: The user's model.
        images: ``[B, C, H, W]``.
        metric: Of the user.
        clock: The budget.
        batch_size: Of the user.
        given: Images of the first batch that the user gave.
    """
    dense, one = weights_shared(host), images[:1]
    shape = tuple(one.shape)
    try:
        with torch.no_grad():
            dense(one)  # to warm up
            output, seconds = timing.timed(partial(dense, one))
    except Exception as error:
        raise DataError(
            f"{type(host).__name__} does not run on images of shape {shape_text(shape)}: "
            f"{first_line(error, named=True)}"
        ) from error
    batches = in_batches(images, batch_size or fitting_size(seconds, given, clock.budget_s))
    own_shape = backbone_of(dense).input_shape(dense)
    surveyed = survey(dense, None if own_shape == shape else shape)
    surveyed.attention(dense)  # raises where there is none
    return Runner(dense, OutputMetric.of(dense, output, metric), batches, surveyed, clock)
