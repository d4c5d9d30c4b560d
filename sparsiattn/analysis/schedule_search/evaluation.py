"""Evaluation of candidates: run on images, counted in MACs, and timed for a budget of time."""

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
    """The result of one candidate.

    Attributes:
        candidate: Its options and shares.
        divergence: Divergence from the dense model, mean over images: KL divergence of predictions
            in nats, or 1 minus the cosine of features, or 1 minus the user's metric.
        agreement: Share of images with the same predicted class, or mean cosine of features, or
            mean of the user's metric.
        macs: MACs per image.
        latency: Time relative to the dense model; None if not measured.
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
        model: The model to search; it is replaced by a copy.
        images: Batches ``[B, 3, H, W]``.
        example: An image batch or shape, if the model's input size is not known.
        only_if_faster: As in `patch`.
        metric: The comparison, as in `OutputMetric.of`; None to choose it by the model.
        tick: Called after every batch and round.
        dense_seconds: Time of the dense model for all images, in seconds.
        batch_seconds: Time of the dense model for the first batch, in seconds.
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
            # stored, as unpatch removes them from the model
            weights = self.model.state_dict().items()
            self.planners = {n: w.clone() for n, w in weights if is_planner_key(n)}
            patch.unpatch()
        self.survey = survey(self.model, self.example)
        with torch.no_grad():
            first = self.model(self.images[0])
            self.batch_seconds = timed(partial(self.model, self.images[0]))[1]
        self.measure = OutputMetric.of(self.model, first, self.metric)
        self.dense, self.dense_seconds = timed(self._outputs)

    @contextmanager
    def patched(
        self, schedule: Any, strategy: Config, model: nn.Module | None = None
    ) -> Iterator[Patch]:
        """Patch the copy with a schedule inside the block, with the weights of trained planners.

        Args:
            schedule: As in `patch`.
            strategy: The strategy with its options.
            model: Another copy to patch instead; None for `model`.
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
                raise ModelChanged(
                    f"the patch has weights that its copy does not have: {unexpected[:3]}; "
                    "unpatch() and patch the model again"
                )
            yield patch

    def run(self, space: Space, candidate: Candidate) -> Trial:
        """Run a candidate on all images."""
        strategy = space.settings[candidate.setting].strategy
        with self.patched(space.schedule(candidate), strategy) as patch:
            macs = report(patch, space.macs).macs
            outputs = self._outputs()
        if macs is None:
            raise InvalidOption(
                f"search() needs a strategy with fixed cost, and that of {strategy.name!r} depends "
                "on values: use a fixed budget"
            )
        divergence, agreement = self._compared(outputs)
        return Trial(candidate, divergence, agreement, macs)

    def time(self, space: Space, candidates: Sequence[Candidate], rounds: int) -> list[float]:
        """Median times relative to the dense model, in the same paired rounds on one batch.

        Each candidate has its own copy of the model, which shares the weights.
        """
        images = self.images[0]
        with torch.no_grad(), ExitStack() as stack:
            calls: dict[str, Callable[[], Any]] = {"dense": partial(self.model, images)}
            for number, candidate in enumerate(candidates):
                model = _copy_with_same_weights(self.model)
                strategy = space.settings[candidate.setting].strategy
                stack.enter_context(self.patched(space.schedule(candidate), strategy, model))
                calls[str(number)] = partial(model, images)
            dense, *candidate_times = alternate(calls, rounds, lambda _: self.tick()).values()
        ratios = ([b / a for a, b in zip(dense, times, strict=True)] for times in candidate_times)
        return [round(Quartiles.of(values).median, 4) for values in ratios]

    @torch.no_grad()
    def _outputs(self) -> list[Any]:
        """Outputs to compare of the model in its current state, by batch."""
        outputs = []
        for batch in self.images:
            output = self.measure.outputs(self.model, (batch,), {})
            outputs.append(output if self.measure.kind == "callable" else main_tensor(output))
            self.tick()
        return outputs

    def _compared(self, outputs: list[Any]) -> tuple[float, float]:
        """Divergence and agreement, means over images; divergence is infinite if not finite."""
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
