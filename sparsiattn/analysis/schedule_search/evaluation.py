"""What a choice does to a model: run on images, counted, and timed where that is the budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.analysis.schedule_search.space import Choice, Space
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.patching import Patch, apply_strategy, logits_of, patch_of
from sparsiattn.patching.report import report
from sparsiattn.patching.survey import survey
from sparsiattn.runtime import paired
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.strategies import Config


@dataclass(frozen=True)
class Trial:
    """One choice, run.

    Attributes:
        choice: A share for every gene.
        divergence: Of its predictions from the dense model's, in nats, mean over images.
        agreement: Share of images where both predict the same class.
        macs: MACs per image.
        latency: Time over the dense model's; None where it was not measured.
    """

    choice: Choice
    divergence: float
    agreement: float
    macs: int
    latency: float | None = None


@dataclass(eq=False)
class TrialRunner:
    """Runs choices on a copy of the model; each only once.

    Attributes:
        model: The model to search; here its copy takes its place.
        strategy: What it is patched with.
        images: Batches ``[B, 3, H, W]``.
        example: An image batch or shape, where the model does not say which.
        only_if_faster: As for `patch`.
        trials: What was run so far.
    """

    model: nn.Module
    strategy: Config
    images: list[Tensor]
    example: Any
    only_if_faster: bool
    trials: dict[Choice, Trial] = field(default_factory=dict)

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
        self.dense = self._logits()

    @contextmanager
    def patched(self, schedule: Any, strategy: Config | None = None) -> Iterator[Patch]:
        """Inside the block, the copy patched with a schedule, its planners as they were trained."""
        with apply_strategy(
            self.model,
            strategy or self.strategy,
            schedule=schedule,
            example=self.example,
            only_if_faster=self.only_if_faster,
            surveyed=self.survey,
            cut_to_grid=self.was_patched,
        ) as patch:
            unexpected = self.model.load_state_dict(self.planners, strict=False).unexpected_keys
            if unexpected:
                raise ModelChanged(f"the patch has weights that its copy has not: {unexpected[:3]}")
            yield patch

    def run(self, space: Space, choice: Choice) -> Trial:
        """The trial of a choice, from before where there is one."""
        if choice not in self.trials:
            self.trials[choice] = self._run(space, choice)
        return self.trials[choice]

    def _run(self, space: Space, choice: Choice) -> Trial:
        if choice == space.dense:
            return Trial(choice, 0.0, 1.0, space.macs)
        with self.patched(space.schedule(choice)) as patch:
            macs = report(patch, space.macs).macs
            logits = self._logits()
        if macs is None:
            raise InvalidOption(
                f"{self.strategy.name!r} has no fixed cost, so it cannot be searched"
            )
        divergence, same = 0.0, 0
        for sparse, dense in zip(logits, self.dense, strict=True):
            p, q = sparse.log_softmax(-1), dense.log_softmax(-1)
            divergence += float(F.kl_div(p, q, reduction="sum", log_target=True))
            same += int((sparse.argmax(-1) == dense.argmax(-1)).sum())
        count = sum(len(batch) for batch in self.images)
        return Trial(choice, divergence / count, same / count, macs)

    @torch.inference_mode()
    def _logits(self) -> list[Tensor]:
        """Logits of the model as it is now, by batch."""
        return [logits_of(self.model(batch), self.model).float() for batch in self.images]

    def timed(self, space: Space, trial: Trial, rounds: int) -> Trial:
        """The trial with its latency, measured where it was not before."""
        if trial.latency is None:
            dense = trial.choice == space.dense
            latency = 1.0 if dense else self.latency(space, trial.choice, rounds)
            trial = self.trials[trial.choice] = replace(trial, latency=latency)
        return trial

    @torch.inference_mode()
    def latency(self, space: Space, choice: Choice, rounds: int) -> float:
        """Median time over the dense model's, in paired rounds on the first images."""
        images = self.images[0]
        with self.patched(space.schedule(choice)) as patch:

            def dense() -> None:
                with patch.disabled():
                    self.model(images)

            timing = paired(dense, lambda: self.model(images), rounds)
        return timing.ratio.rounded(4)[0]
