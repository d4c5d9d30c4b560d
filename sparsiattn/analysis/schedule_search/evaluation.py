"""What a choice does to a model: run on images, counted, and timed where that is the budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.analysis.schedule_search.space import Choice, Space
from sparsiattn.errors import InvalidOption, ModelChanged
from sparsiattn.patching.apply import apply_strategy
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.patching.report import report
from sparsiattn.patching.survey import survey
from sparsiattn.runtime.timing import paired
from sparsiattn.strategies.config import Config
from sparsiattn.training.evaluation import logits_of


@dataclass(frozen=True)
class Trial:
    """One choice, run: divergence of its predictions from the dense model's (nats, mean over
    images), the share of images where both say the same, MACs per image; latency: time over dense
    time, None where it was not measured."""

    choice: Choice
    divergence: float
    agreement: float
    macs: int
    latency: float | None = None


class Trials:
    """Runs choices on a copy of the model; each only once."""

    def __init__(
        self, model: nn.Module, base: Config, images: list[Tensor], example: Any, faster: bool
    ) -> None:
        live = patch_of(model)
        self.model = deepcopy(model).eval()
        self.planners = {} if live is None else _planners(self.model)
        copied = patch_of(self.model)
        if copied is not None:
            copied.unpatch()
        self.base, self.images, self.example, self.faster = base, images, example, faster
        self.survey = survey(self.model, example)
        self.seen: dict[Choice, Trial] = {}
        with torch.inference_mode():
            self.dense = [logits_of(self.model(x), self.model).float() for x in images]

    @contextmanager
    def patched(self, schedule: Any, base: Config | None = None) -> Iterator[Patch]:
        with apply_strategy(
            self.model,
            base or self.base,
            schedule=schedule,
            example=self.example,
            only_if_faster=self.faster,
            found=self.survey,
        ) as live:
            found = self.model.load_state_dict(self.planners, strict=False)
            if found.unexpected_keys:
                raise ModelChanged(
                    f"the patch has weights that its copy has not: {found.unexpected_keys[:3]}"
                )
            yield live

    def run(self, space: Space, choice: Choice) -> Trial:
        if choice not in self.seen:
            self.seen[choice] = self._run(space, choice)
        return self.seen[choice]

    @torch.inference_mode()
    def _run(self, space: Space, choice: Choice) -> Trial:
        if choice == space.dense:
            return Trial(choice, 0.0, 1.0, space.macs)
        with self.patched(space.schedule(choice)) as live:
            macs = report(live, space.macs).macs
            found = [logits_of(self.model(x), self.model).float() for x in self.images]
        if macs is None:
            raise InvalidOption(f"{self.base.name!r} has no fixed cost, so it cannot be searched")
        pairs = list(zip(found, self.dense, strict=True))
        count = sum(len(x) for x in self.images)
        divergence = sum(
            float(F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="sum", log_target=True))
            for x, y in pairs
        )
        same = sum(int((x.argmax(-1) == y.argmax(-1)).sum()) for x, y in pairs)
        return Trial(choice, divergence / count, same / count, macs)

    @torch.inference_mode()
    def latency(self, space: Space, choice: Choice, rounds: int) -> float:
        """Median time over the dense model's, in paired rounds on the first images."""
        images = self.images[0]
        with self.patched(space.schedule(choice)) as live:

            def dense() -> None:
                with live.disabled():
                    self.model(images)

            timing = paired(dense, lambda: self.model(images), rounds)
        return timing.ratio.rounded(4).median


def _planners(model: nn.Module) -> dict[str, Tensor]:
    from sparsiattn.runtime.site_runtime import PLANNER

    return {n: t.clone() for n, t in model.state_dict().items() if f".{PLANNER}." in f".{n}"}
