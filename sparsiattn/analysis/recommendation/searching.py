"""One search: settings one after the other while there is time, then the best ones again."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from sparsiattn.analysis.recommendation.choice import Goal
from sparsiattn.analysis.recommendation.contenders import Contender, Runner
from sparsiattn.analysis.recommendation.families import Settings, Shape, families, line_of, shape_of
from sparsiattn.analysis.recommendation.plan import Plan, Track
from sparsiattn.analysis.recommendation.resolution import smaller
from sparsiattn.analysis.recommendation.result import Measurement, Recommendation
from sparsiattn.patching.discovery.backbone import backbone_of

COARSE = 3
"""Pairs of runs by which a setting is judged at first; slow ones get two, or one."""
FINE = 11
"""Pairs of runs of the setting that is picked and of the next best, or more to see all images."""
FAR_APART = 1.5
"""Third quartile over first from which speeds of one setting contradict each other."""
MOST = 32
"""Pairs of runs of a setting at most."""


@dataclass(eq=False)
class Search:
    """A search on one model.

    Attributes:
        runner: Runs settings.
        goal: What the user wants.
        plan: Which setting comes next.
        shape: What the short list depends on.
        dense_s: Seconds of a dense pass.
        is_cut: Whether the budget ended before the plan.
    """

    runner: Runner
    goal: Goal
    plan: Plan = field(init=False)
    shape: Shape = field(init=False)
    dense_s: float = 0.0
    is_cut: bool = False

    def __post_init__(self) -> None:
        self.shape = shape_of(self.runner.surveyed, self.runner.dense)
        tracks = [Track(family, self.goal) for family in families(self.shape)]
        self.plan = Plan(tracks, self.goal)

    def run(self) -> Recommendation:
        """Measure as long as there is time and something to gain."""
        self.dense_s = self.runner.warm()
        while self._explore() or self._confirm():
            pass
        return self._result([*self.plan.contenders, *self._smaller_images()])

    def _explore(self) -> bool:
        """Try what the plan says; returns whether anything was tried."""
        tried = self.is_cut = False
        while step := self.plan.next():
            if not self._has_time():
                self.is_cut = True
                break
            self._try(*step)
            tried = True
        return tried

    def _has_time(self) -> bool:
        """Whether one more setting can be tried, and be run again if it is the best."""
        clock, best = self.runner.clock, self.goal.pick(self.plan.contenders)
        if best is None:
            return clock.left > 0 or not any(c.rounds for c in self.plan.contenders)
        again = FINE - best.rounds if self.goal.met_by(best) else 2
        return clock.left > min(0.3 * clock.budget_s, 2.0 * again * self.dense_s) + 4 * self.dense_s

    def _try(self, track: Track, x: float) -> None:
        clock, settings = self.runner.clock, self._settings(track.family.build(x))
        clock.tell(line_of(settings))
        track.tried[x] = contender = self.runner.patched(settings, track.family.name)
        if not contender.reason:
            self.runner.measure(contender, COARSE, clock.budget_s / 30)

    def _settings(self, settings: Settings) -> Settings:
        """With the shape of the images, where the model does not say it."""
        dense, shape = self.runner.dense, tuple(self.runner.batches[0][:1].shape)
        known = backbone_of(dense).input_shape(dense) == shape
        return settings if known else {**settings, "input": shape}

    def _confirm(self) -> bool:
        """Run the setting that is picked and the next best more often; returns whether any ran."""
        clock, ran = self.runner.clock, False
        rounds = min(MOST, max(FINE, len(self.runner.batches)))
        while needy := [c for c in self._best_two() if c.rounds < rounds]:
            contender = min(needy, key=lambda c: c.rounds)
            is_met = self.goal.met_by(contender)
            if clock.left < 4.0 * self.dense_s or not (is_met or self.plan.next() is None):
                break
            clock.tell(f"again: {line_of(contender.settings)}")
            self.runner.pair(contender)
            ran = True
        return ran

    def _best_two(self) -> list[Contender]:
        best = self.goal.pick(self.plan.contenders)
        if best is None:
            return []
        others = [c for c in self.plan.contenders if c is not best]
        second = self.goal.pick(others)
        return [best, second] if second is not None and self.goal.met_by(second) else [best]

    def _smaller_images(self) -> list[Contender]:
        """The dense model at the speed of what is picked, if there is time for it."""
        clock, best = self.runner.clock, self.goal.pick(self.plan.contenders)
        ratio = self.goal.speedup or (best and best.ratio) or 1.0
        if ratio <= 1.0 or clock.left < 3.0 * self.dense_s:
            return []
        clock.tell("smaller images")
        contender = smaller(self.runner, self.shape, ratio)
        if not contender.reason:
            self.runner.measure(contender, COARSE, clock.left)
        return [contender]

    def _result(self, contenders: list[Contender]) -> Recommendation:
        best = self.goal.pick(self.plan.contenders)
        wins = best is not None and (best.ratio or 0.0) > 1.0
        settings = best.settings if best is not None and wins else {}
        runner, device = self.runner, self.runner.batches[0].device
        rows = sorted(contenders, key=lambda c: (c is not best, not c.settings, -(c.ratio or 0.0)))
        dense_s = [s for c in contenders for s in c.dense_s] or [self.dense_s]
        return Recommendation(
            line=line_of(settings) if settings else "",
            settings=settings,
            met=best is not None and wins and self.goal.met_by(best),
            table=tuple(map(self._row, rows)),
            speedup=self.goal.speedup,
            quality=self.goal.quality,
            metric=runner.metric.kind,
            metric_guessed=runner.metric.guessed,
            bound=round(self.shape.bound, 4),
            attention_share=round(self.shape.attention, 4),
            model=type(runner.dense).__name__,
            input_shape=tuple(runner.batches[0].shape),
            device=str(device),
            images=sum(map(len, runner.batches)),
            dense_ms=round(1e3 * median(dense_s), 3),
            seconds=round(runner.clock.gone, 1),
            notes=self._notes(best),
        )

    def _notes(self, best: Contender | None) -> tuple[str, ...]:
        """What to know of the figures, and what to do about it."""
        notes = []
        if self.is_cut:
            notes.append(
                "the budget ended before all was tried: more budget_s may find a better setting"
            )
        if best is not None and best.quartiles is not None:
            low, high = best.quartiles.rounded(4)[1]
            if high > FAR_APART * low:
                notes.append(
                    f"speeds of the first row lie far apart ({low:.2f} to {high:.2f}): is other "
                    "work running on this machine? Run it again when that is over"
                )
        return tuple(notes)

    def _row(self, contender: Contender) -> Measurement:
        quartiles = contender.quartiles
        return Measurement(
            line=line_of(contender.settings) if contender.settings else contender.label,
            settings=contender.settings,
            family=contender.label,
            ratio=contender.ratio,
            ratio_quartiles=None if quartiles is None else quartiles.rounded(4)[1],
            quality=contender.quality,
            met=self.goal.met_by(contender),
            rounds=contender.rounds,
            images=sum(map(len, contender.qualities.values())),
            reason=contender.reason,
        )
