"""What a candidate does to a model: run on images, counted, and timed where that is the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.analysis.schedule_search.space import Candidate, Space
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.patching import Patch, apply_strategy, patch_of
from sparsiattn.patching.model_outputs import Metric, OutputMetric, channel_axis, main_tensor
from sparsiattn.patching.report import report
from sparsiattn.patching.survey import survey
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.runtime.timing import Quartiles, alternate, timed
from sparsiattn.strategies import Config


@dataclass(frozen=True)
class Trial:
    """One candidate, run.

    Attributes:
        candidate: Its options and shares.
        divergence: From the dense model, mean over images: in nats between predictions, or 1 less
            the cosine of features, or 1 less what the user's function says.
        agreement: Share of images where both predict the same class, or the mean cosine of
            features, or of what the user's function says.
        macs: MACs per image.
        latency: Time over the dense model's; None where it was not measured.
    """

    candidate: Candidate
    divergence: float
    agreement: float
    macs: int
    latency: float | None = None


@dataclass(eq=False)
class TrialRunner:
    """Runs candidates on a copy of the model.

    Attributes:
        model: The model to search; here its copy takes its place.
        images: Batches ``[B, 3, H, W]``.
        example: An image batch or shape, where the model does not say which.
        only_if_faster: As for `patch`.
        metric: What is compared, as `OutputMetric.of` takes it; here the one that was decided.
        tick: Called after every batch and round.
        dense_seconds: Of the dense model, for all images.
        batch_seconds: Of the dense model, for the first batch.
    """

    model: nn.Module
    images: list[Tensor]
    example: Any
    only_if_faster: bool
    metric: Metric | None = None
    tick: Callable[[], Any] = lambda: None

    def __post_init__(self) -> None:
        self.model = deepcopy(self.model).eval()
        self.planners: dict[str, Tensor] = {}
        patch = patch_of(self.model)
        self.was_patched = patch is not None
        if patch is not None:
            # kept aside, as they leave the model with the patch
            weights = self.model.state_dict().items()
            self.planners = {n: w.clone() for n, w in weights if is_planner_key(n)}
            patch.unpatch()
        self.survey = survey(self.model, self.example)
        with torch.inference_mode():
            first = self.model(self.images[0])
            self.batch_seconds = timed(partial(self.model, self.images[0]))[1]
        self.measure = OutputMetric.of(self.model, first, self.metric)
        self.dense, self.dense_seconds = timed(self._outputs)

    @contextmanager
    def patched(
        self, schedule: Any, strategy: Config, model: nn.Module | None = None
    ) -> Iterator[Patch]:
        """Inside the block, the copy patched with a schedule, its planners as they were trained.

        Args:
            schedule: As `patch` takes it.
            strategy: With its options.
            model: Another copy.
        """
        model = self.model if model is None else model
        with apply_strategy(
            model,
            strategy,
            schedule=schedule,
            example=self.example,
            only_if_faster=self.only_if_faster,
            surveyed=self.survey,
            cut_to_grid=self.was_patched,
        ) as patch:
            unexpected = model.load_state_dict(self.planners, strict=False).unexpected_keys
            if unexpected:
                raise ModelChanged(f"the patch has weights that its copy has not: {unexpected[:3]}")
            yield patch

    def run(self, space: Space, candidate: Candidate) -> Trial:
        """Run a candidate on all images."""
        strategy = space.settings[candidate.setting].strategy
        with self.patched(space.schedule(candidate), strategy) as patch:
            macs = report(patch, space.macs).macs
            outputs = self._outputs()
        if macs is None:
            raise InvalidOption(f"{strategy.name!r} has no fixed cost, so it cannot be searched")
        divergence, agreement = self._compared(outputs)
        return Trial(candidate, divergence, agreement, macs)

    def time(self, space: Space, candidates: Sequence[Candidate], rounds: int) -> list[float]:
        """Median time of each over the dense model's, in the same paired rounds, on one batch.

        Each has a copy of the model, which shares its weights.
        """
        images = self.images[0]
        with torch.inference_mode(), ExitStack() as stack:
            calls: dict[str, Callable[[], Any]] = {"dense": partial(self.model, images)}
            for number, candidate in enumerate(candidates):
                model = _copy_with_same_weights(self.model)
                strategy = space.settings[candidate.setting].strategy
                stack.enter_context(self.patched(space.schedule(candidate), strategy, model))
                calls[str(number)] = partial(model, images)
            dense, *others = alternate(calls, rounds, lambda _: self.tick()).values()
        ratios = ([b / a for a, b in zip(dense, times, strict=True)] for times in others)
        return [round(Quartiles.of(values).median, 4) for values in ratios]

    @torch.inference_mode()
    def _outputs(self) -> list[Any]:
        """What is compared, of the model as it is now, by batch."""
        outputs = []
        for batch in self.images:
            output = self.measure.outputs(self.model, (batch,), {})
            outputs.append(output if self.measure.kind == "callable" else main_tensor(output))
            self.tick()
        return outputs

    def _compared(self, outputs: list[Any]) -> tuple[float, float]:
        """Divergence and agreement, means over images; outputs that are not finite diverge most."""
        divergence, agreement, count = 0.0, 0.0, sum(map(len, self.images))
        for batch, dense, patched in zip(self.images, self.dense, outputs, strict=True):
            same = self.measure.compare(self.model, dense, patched)
            agreement += len(batch) * float(torch.as_tensor(same, dtype=torch.double).mean())
            if self.measure.kind == "classes":
                axis = channel_axis(self.model, dense)
                p, q = patched.float().log_softmax(axis), dense.float().log_softmax(axis)
                nats = F.kl_div(p, q, reduction="none", log_target=True).sum(axis)
                divergence += float(nats.reshape(len(nats), -1).mean(1).sum())
        if self.measure.kind != "classes":
            divergence = count - agreement
        return divergence / count if math.isfinite(divergence) else math.inf, agreement / count


def _copy_with_same_weights(model: nn.Module) -> nn.Module:
    weights = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in weights})
