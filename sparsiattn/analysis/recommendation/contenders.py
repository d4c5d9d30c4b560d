"""Runs settings in turn with the dense model on the same images, and compares time and outputs."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.analysis.recommendation.clock import Clock
from sparsiattn.analysis.recommendation.families import Settings
from sparsiattn.errors import DataError, first_line
from sparsiattn.patching.apply import apply_strategy, resolve
from sparsiattn.patching.handle import Patch, unpatch
from sparsiattn.patching.model_outputs import OutputMetric
from sparsiattn.patching.survey import ModelSurvey
from sparsiattn.runtime import timing
from sparsiattn.runtime.timing import Quartiles
from sparsiattn.strategies.hybrid import Hybrid

LEAST = 2
"""Pairs of runs, where there is time: the machine may be busy during a single one."""
AGREE = 1.15
"""Third quartile over first of speeds that agree; others get more pairs."""
REASON = 110
"""Letters of a reason."""
Compare = Callable[[Any, Any], "Tensor | float"]


def weights_shared(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the parameters; buffers are its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()


@dataclass(eq=False)
class Contender:
    """Something that runs in pairs with the dense model.

    Attributes:
        settings: Keyword arguments of `patch`; empty if it is not a patch.
        label: The family of its settings, or what it is where it has none.
        run: From a number of a batch to the output, not timed yet.
        compare: From the dense and its own output to the quality of each image.
        dense_s: Seconds of the dense model, pair by pair.
        own_s: Its own.
        qualities: By batch, those of its images.
        reason: Why it cannot run, in short; else empty.
    """

    settings: Settings
    run: Callable[[int], Any] | None = None
    compare: Compare | None = None
    label: str = ""
    dense_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)
    qualities: dict[int, list[float]] = field(default_factory=dict)
    reason: str = ""

    @property
    def rounds(self) -> int:
        """Pairs that ran."""
        return len(self.own_s)

    @property
    def quartiles(self) -> Quartiles | None:
        """Of dense time over its own, pair by pair."""
        if not self.own_s or self.reason:
            return None
        return Quartiles.of(d / o for d, o in zip(self.dense_s, self.own_s, strict=True))

    @property
    def ratio(self) -> float | None:
        """Their median."""
        return None if self.quartiles is None else self.quartiles.rounded(4)[0]

    @property
    def agrees(self) -> bool:
        """Whether at least two pairs ran, and their speeds are about the same."""
        low, _, high = self.quartiles or (0.0, 0.0, 0.0)
        return self.rounds >= LEAST and high <= AGREE * low

    @property
    def quality(self) -> float | None:
        """Mean over the images it saw."""
        values = [value for batch in self.qualities.values() for value in batch]
        return None if not values or self.reason else round(fmean(values), 6)

    def note(self, batch: int, values: Tensor | float) -> None:
        """Keep the quality of a batch."""
        listed = values.flatten().tolist() if isinstance(values, Tensor) else [float(values)]
        self.qualities[batch] = [float(value) for value in listed]


@dataclass(eq=False)
class Runner:
    """The dense model, and what is compared with it.

    Attributes:
        dense: A copy of the user's model in eval mode, on the same weights.
        metric: How outputs are compared.
        batches: Images.
        surveyed: What is known of the model's attention.
        clock: The budget.
        models: Copies that may carry a patch.
        first: The dense output for the first batch.
    """

    dense: nn.Module
    metric: OutputMetric
    batches: list[Tensor]
    surveyed: ModelSurvey
    clock: Clock
    models: list[nn.Module] = field(default_factory=list)
    first: Any = None

    def warm(self) -> float:
        """Run the dense model once more; returns its seconds."""
        with torch.no_grad():
            self.first, seconds = timing.timed(partial(self.output, self.dense, 0))
        return seconds

    def output(self, model: nn.Module, batch: int) -> Any:
        """What is compared of a model's answer to a batch."""
        return self.metric.outputs(model, (self.batches[batch],), {})

    def patched(self, settings: Settings, label: str) -> Contender:
        """A contender with a patch on a copy; with a reason where the model refuses."""
        model = weights_shared(self.dense)
        self.models.append(model)
        run, compare = partial(self.output, model), partial(self.metric.compare, self.dense)
        contender = Contender(settings, run, compare, label)
        try:
            contender.reason = _idle(self._patch(model, dict(settings)))
        except Exception as error:  # of a plug-in, too: the others may still do
            contender.reason = short(error)
        return contender

    def _patch(self, model: nn.Module, options: dict[str, Any]) -> Patch:
        strategy, options = options.pop("strategy"), without_input(options)
        only_if_faster = options.pop("only_if_faster", None)
        config = resolve(strategy, None, options)
        if only_if_faster is None:
            only_if_faster = isinstance(config, Hybrid)
        return apply_strategy(model, config, surveyed=self.surveyed, only_if_faster=only_if_faster)

    def pair(self, contender: Contender) -> None:
        """One run of each in turn on the next batch, after one to warm up."""
        assert contender.run is not None
        assert contender.compare is not None
        try:
            with torch.no_grad():
                if not contender.qualities:
                    contender.note(0, contender.compare(self.first, contender.run(0)))
                self._timed_pair(contender, contender.run, contender.compare)
        except DataError:
            raise
        except Exception as error:  # whatever a kernel raises: the others may still do
            contender.reason = short(error)

    def _timed_pair(
        self, contender: Contender, run: Callable[[int], Any], compare: Compare
    ) -> None:
        turn = contender.rounds
        batch = (turn + 1) % len(self.batches)
        calls = {"dense": partial(self.output, self.dense, batch), "own": partial(run, batch)}
        # the order turns, as in `timing.alternate`
        done = {name: timing.timed(calls[name]) for name in list(calls)[:: -1 if turn % 2 else 1]}
        contender.dense_s.append(done["dense"][1])
        contender.own_s.append(done["own"][1])
        if batch not in contender.qualities:
            contender.note(batch, compare(done["dense"][0], done["own"][0]))

    def measure(self, contender: Contender, rounds: int, seconds: float) -> None:
        """Run pairs: one in any case, more until so many, or so many seconds, or no time is left.

        A single pair, or pairs that contradict each other, decide nothing where there is time for
        more: twice the pairs and twice the seconds, then.

        Args:
            contender: One without a reason.
            rounds: Pairs in all at most, those that ran before counted.
            seconds: After so many no other begins.
        """
        start = self.clock.gone
        while not contender.reason:
            used, ran = self.clock.gone - start, contender.rounds
            factor = 1 if contender.agrees else 2
            if ran and (used > factor * seconds or ran >= factor * rounds):
                return
            if ran and self.clock.left < used / ran:
                return
            self.pair(contender)
            self.clock.tell()

    def close(self) -> None:
        """Undo every patch."""
        for model in self.models:
            unpatch(model)


def without_input(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the shape of the image, which the survey knows."""
    return {name: value for name, value in options.items() if name != "input"}


def _idle(patch: Patch) -> str:
    """Why running a patch would tell nothing new."""
    if not patch.only_if_faster:
        return ""
    dense = [runtime.dense for runtime in patch.runtimes]
    if all(dense):
        return "no site is expected to win from fewer keys"
    if not any(dense) and not isinstance(patch.strategy, Hybrid):
        return "as without: every site is expected to win"
    return ""


def short(error: Exception) -> str:
    """An error's first words, for a column.

    >>> short(ValueError("tokens must stay: this model has windows; use token_drop"))
    'tokens must stay: this model has windows'
    """
    text = first_line(error).split("; ")[0].rstrip(".")
    return textwrap.shorten(text, REASON, placeholder=" ...")
