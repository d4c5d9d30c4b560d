"""What `recommend` found: the setting as a line of code, and the table that it was picked from."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparsiattn.analysis.attention_bound import bound_text
from sparsiattn.analysis.recommendation.choice import Goal
from sparsiattn.analysis.recommendation.families import line_of
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import patch_quietly
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.text import Row, plain, shape_text, speed_text

COLUMNS = 100
"""Letters of a line."""
WIDTH = 60
"""Letters of a setting in the table; `Measurement.line` has all of them."""


@dataclass(frozen=True)
class Measurement:
    """A row of the table.

    Attributes:
        line: The call of `patch`, or a description of what else was measured.
        settings: Keyword arguments of `patch`; empty if it is not a patch.
        family: Name of the group of settings that differ only in one number.
        ratio: Dense time over its time, the median over pairs of runs: more is faster; None where
            it did not run.
        ratio_quartiles: First and third quartile of those.
        quality: Share of answers kept or mean cosine of features, mean over images.
        met: Whether it meets the goal.
        rounds: Pairs of runs.
        images: Images that the quality is a mean over.
        reason: Why it did not run, in short; else empty.
    """

    line: str
    settings: Mapping[str, Any]
    family: str = ""
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    quality: float | None = None
    met: bool = False
    rounds: int = 0
    images: int = 0
    reason: str = ""

    @property
    def name(self) -> str:
        """The line without what all lines of the table have."""
        text = self.line
        if self.settings:
            shown = {name: value for name, value in self.settings.items() if name != "input"}
            text = line_of(shown).removeprefix("sparsiattn.patch(model, ").removesuffix(")")
        return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."

    def cells(self) -> Row:
        """As text, of a row that ran."""
        low, high = (_floor(value, 2) for value in self.ratio_quartiles or (0.0, 0.0))
        spread = f"{low:.2f}-{high:.2f}" if self.rounds > 1 else "one pair"
        met = "yes" if self.met else "no"
        # rounded down: what is just short of the goal must not look as if it met it
        speed, quality = _floor(self.ratio or 0.0, 2), _floor(self.quality or 0.0, 4)
        return self.name, speed_text(speed), spread, f"{quality:.4f}", met


@dataclass(frozen=True)
class Recommendation:
    """A setting of `patch` for a goal, and all that was measured. ``print`` it, or take `to_dict`.

    Attributes:
        line: The call ``sparsiattn.patch(model, ...)``; empty where nothing beats the dense model.
        settings: Its keyword arguments.
        met: Whether it meets the goal; if not, it is the closest that was found.
        table: All that was measured or refused; smaller images, which are no patch, at the end.
        speedup: The least dense time over patched time that was asked for.
        quality: The least quality that was asked for.
        metric: How quality is measured: ``"classes"``, ``"features"`` or ``"callable"``.
        metric_guessed: Whether the model was asked for it, not the user.
        bound: How much faster the model could be if attention took no time and all else its share
            of the MACs: only fewer tokens go beyond.
        attention_share: Share of the model's MACs that attention has, from which that follows.
        model: Class of the model.
        input_shape: Shape of the batches that were timed.
        device: Device of the model.
        images: Images that were read.
        dense_ms: Median milliseconds of a dense forward pass.
        seconds: What it all took.
        notes: What else to know of the figures.
    """

    line: str
    settings: Mapping[str, Any]
    met: bool
    table: tuple[Measurement, ...]
    speedup: float | None
    quality: float | None
    metric: str
    metric_guessed: bool
    bound: float
    attention_share: float
    model: str
    input_shape: tuple[int, ...]
    device: str
    images: int
    dense_ms: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def picked(self) -> Measurement | None:
        """The row of the table that is recommended; None where nothing beats the dense model."""
        rows = (row for row in self.table if self.line and row.line == self.line)
        return next(rows, None)

    def apply(self, model: nn.Module) -> Patch:
        """Patch a model with the setting.

        Args:
            model: The one that was measured, or one like it.

        Returns:
            The live patch.

        Raises:
            InvalidOption: Nothing beats the dense model, so there is nothing to apply.
        """
        if not self.settings:
            raise InvalidOption(f"there is no setting to apply: {self.verdict}")
        return patch_quietly(model, **self.settings)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        goal, row = str(Goal(self.speedup, self.quality)), self.picked
        if row is None:
            return f"nothing tried meets {goal} and is faster than the dense model; {self.limit}"
        figures = f"{row.cells()[1]} at {self.label} {row.cells()[3]}"
        if self.met:
            return f"{goal}: met, {figures}"
        return f"{goal}: not met; the closest is {figures}; {self.limit}"

    @property
    def label(self) -> str:
        """What the quality is."""
        return {"classes": "answers kept", "features": "cosine"}.get(self.metric, "metric")

    @property
    def limit(self) -> str:
        """What cannot be exceeded."""
        return bound_text(self.attention_share)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        metric = f"{self.label} ({'guessed: ' if self.metric_guessed else ''}{self.metric})"
        about = (
            f"{self.model}, input {shape_text(self.input_shape)} on {self.device}, dense "
            f"{self.dense_ms:.1f} ms, {self.images} images, quality: {metric}"
        )
        rows: list[Row] = [("setting", "speed", "quartiles", self.label, "met")]
        rows += [row.cells() for row in self.table if not row.reason]
        head = [*_wrapped(self.verdict), *([self.line] if self.line else []), *_wrapped(about)]
        return plain([*head, rows, *self._refused(), *self.notes])

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def _refused(self) -> list[str]:
        """What did not run, by reason."""
        families: dict[str, dict[str, None]] = {}
        for row in self.table:
            if row.reason:
                families.setdefault(row.reason, {})[row.family] = None
        lines = (f"left out: {', '.join(names)}: {why}" for why, names in families.items())
        return [part for line in lines for part in _wrapped(line)]


def _floor(value: float, digits: int) -> float:
    """A value rounded down.

    >>> _floor(1.999, 2), _floor(1.4, 2)
    (1.99, 1.4)
    """
    return math.floor(value * 10.0**digits + 1e-6) / 10.0**digits


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
