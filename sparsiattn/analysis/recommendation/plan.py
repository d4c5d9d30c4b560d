"""What to try next: each family's number moves until it just meets the goal."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsiattn.analysis.recommendation.choice import Goal
from sparsiattn.analysis.recommendation.contenders import Contender
from sparsiattn.analysis.recommendation.families import Family

MARGIN = 0.96
"""Aim at so much less time than is asked for: figures vary from run to run."""
CLOSE = 1.06
"""Speeds that differ by no more than this factor need no setting between them."""
STRIDE = 1.03
"""The least change of time from one setting to the next, where the goal is not between two."""
GROWTH = 2.5
"""Losses grow about by this power of the time that is saved."""
START = 0.75
"""Share of the dense time that is tried first where the goal is quality."""
HOPELESS = 3.0
"""A family whose loss is expected to be so many times the best one's is not refined."""


@dataclass(eq=False)
class Track:
    """The settings of one family that were tried, by their number.

    Attributes:
        family: The family.
        goal: What the user wants.
        tried: By number.
    """

    family: Family
    goal: Goal
    tried: dict[float, Contender] = field(default_factory=dict)

    @property
    def measured(self) -> dict[float, Contender]:
        """Those that ran."""
        return {x: c for x, c in self.tried.items() if c.ratio is not None}

    def first(self) -> float:
        """The number to begin with."""
        speed = self.goal.speedup
        return self.family.solve(START if speed is None else MARGIN / speed)

    def next(self) -> float | None:
        """The number to try next, None where the family is done."""
        if not self.tried:
            return self.first()
        if not self.measured:
            return None  # refused
        x = self._towards_speed() if self.goal.speedup else self._towards_quality()
        return None if x is None or x in self.tried else x

    def _towards_speed(self) -> float | None:
        """The most that stays among what is fast enough."""
        speed = self.goal.speedup or 1.0
        fast = {x: c.ratio or 0.0 for x, c in self.measured.items() if self.goal.is_fast(c)}
        slow = [x for x in self.measured if x not in fast]
        low, high = max(fast, default=None), min(slow, default=None)
        if low is not None and fast[low] <= CLOSE * speed:
            return None
        share = MARGIN / speed
        x, c = min(self.measured.items(), key=lambda item: abs(1.0 / (item[1].ratio or 1) - share))
        # what it took beyond what was expected, it will take again
        return self._between(low, high, share - 1.0 / (c.ratio or 1) + self.family.time(x))

    def _towards_quality(self) -> float | None:
        """The least that stays among what is good enough."""
        good = [x for x, c in self.measured.items() if self.goal.is_good(c)]
        bad = [x for x in self.measured if x not in good]
        low, high = max(bad, default=None), min(good, default=None)
        x = min(self.measured, key=lambda x: abs(self._loss(x) - self._allowed))
        change = (max(self._allowed, 1e-4) / max(self._loss(x), 1e-4)) ** (1.0 / GROWTH)
        saved = max(0.02, 1.0 - self.family.time(x)) * min(1.8, max(0.4, 0.97 * change))
        return self._between(low, high, 1.0 - saved)

    def _between(self, low: float | None, high: float | None, share: float) -> float | None:
        """The number for a share of the dense time, if it is between two that were tried.

        Args:
            low: The largest number at which too little stays; None if there is none yet.
            high: The least at which too much does.
            share: Of the dense time, as the family expects it.
        """
        if low is not None and high is not None:
            if (self.tried[low].ratio or 0.0) <= CLOSE * (self.tried[high].ratio or 0.0):
                return None
            margin = (high - low) / 5
            x = min(high - margin, max(low + margin, self.family.solve(share)))
            x = max(self.family.rounded(x), self.family.rounded(low + self.family.step))
            return x if low < x < high else None
        x, time = self.family.solve(share), self.family.time
        # where the figures contradict what is expected, they vary: go on by a step
        if low is not None:
            x = max(x, self.family.solve(time(low) * STRIDE), low + self.family.step)
            x = self.family.rounded(x)
            return x if x > low else None
        assert high is not None
        x = min(x, self.family.solve(time(high) / STRIDE), high - self.family.step)
        x = self.family.rounded(x)
        return x if x < high else None

    @property
    def _allowed(self) -> float:
        return 1.0 - (self.goal.quality or 0.0)

    def _loss(self, x: float) -> float:
        return 1.0 - (self.tried[x].quality or 0.0)

    def promise(self) -> tuple[float, float]:
        """What the family is expected to reach, as ``(loss, share of the dense time)``."""
        share = 1.0 if self.goal.speedup is None else 1.0 / self.goal.speedup
        found = []
        for x, contender in self.measured.items():
            ratio, loss = contender.ratio or 1.0, max(1e-6, self._loss(x))
            saved = max(0.02, 1.0 - 1.0 / ratio)
            if self.goal.speedup is None:
                more = (max(self._allowed, 1e-6) / loss) ** (1.0 / GROWTH)
                found.append((loss, max(0.0, 1.0 - saved * min(2.0, more))))
            else:
                found.append((loss * max(1.0, (1.0 - share) / saved) ** GROWTH, share))
        return min(found, key=lambda pair: pair[:: 1 if self.goal.speedup else -1])


@dataclass(eq=False)
class Plan:
    """Which family's turn it is.

    Attributes:
        tracks: The short list.
        goal: What the user wants.
        most: Settings to measure at most.
    """

    tracks: list[Track]
    goal: Goal
    most: int = 12

    @property
    def contenders(self) -> list[Contender]:
        """All that was tried, in the order of the short list, what stays most first."""
        return [t.tried[x] for t in self.tracks for x in sorted(t.tried, reverse=True)]

    def next(self) -> tuple[Track, float] | None:
        """The family and the number to try next; None where there is nothing left to gain."""
        if sum(not c.reason for c in self.contenders) >= self.most:
            return None
        for track in self.tracks:
            if not track.tried and not track.family.parent:
                return track, track.first()
        open_tracks = [(track, x) for track in self.tracks if (x := self._next_of(track))]
        return min(open_tracks, key=lambda pair: self._rank(pair[0]), default=None)

    def _next_of(self, track: Track) -> float | None:
        parent = self._parent_of(track)
        if track.tried or parent is None:
            return track.next() if self._is_hopeful(track) else None
        if not parent.measured or not self._is_hopeful(parent):
            return None
        # a variant begins where its parent ended
        return max(parent.measured, key=lambda x: self._standing(parent.measured[x]))

    def _standing(self, contender: Contender) -> tuple[bool, float]:
        met = self.goal.met_by(contender)
        return met, (contender.quality if met else contender.ratio) or 0.0

    def _is_hopeful(self, track: Track) -> bool:
        """Whether a family may still give what is recommended."""
        if self._is_beaten(track):
            return False
        best = self.goal.pick(self.contenders)
        if not track.measured or best is None or not self.goal.met_by(best):
            return True
        loss, share = track.promise()
        if self.goal.speedup is None:
            return share < 1.0 / (best.ratio or 1.0)
        return loss <= HOPELESS * max(1e-6, 1.0 - (best.quality or 0.0))

    def _is_beaten(self, track: Track) -> bool:
        """Whether a variant is slower and loses more than its parent with the same number."""
        parent = self._parent_of(track)
        if parent is None:
            return False
        shared = track.measured.keys() & parent.measured.keys()
        return any(
            (own.ratio or 0.0) <= (other.ratio or 0.0)
            and (own.quality or 0.0) <= (other.quality or 0.0)
            for own, other in ((track.tried[x], parent.tried[x]) for x in shared)
        )

    def _parent_of(self, track: Track) -> Track | None:
        return next((t for t in self.tracks if t.family.name == track.family.parent), None)

    def _rank(self, track: Track) -> tuple[float, float]:
        """Those that promise most first; of speed alone where quality is the goal."""
        relative = self._parent_of(track) or track
        known = track if track.measured else relative
        loss, share = known.promise()
        return (share, loss) if self.goal.speedup is None else (loss, share)
