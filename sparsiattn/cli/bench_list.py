"""``sparsiattn bench`` without a strategy: the settings from which `recommend` starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsiattn.cli.images import noise
from sparsiattn.cli.model_command import ModelRequest
from sparsiattn.cli.options import flags_of
from sparsiattn.errors import NothingToPatch, SparsiattnError

if TYPE_CHECKING:
    from sparsiattn import BenchResult


@dataclass(frozen=True)
class Timed:
    """A setting and what came of it.

    Attributes:
        settings: Keyword arguments of `sparsiattn.patch`.
        result: Its times; None where the model refuses it.
        reason: Why it does.
    """

    settings: Mapping[str, Any]
    result: BenchResult | None = None
    reason: str = ""

    @property
    def ratio(self) -> float:
        """Dense time over patched time; 0 where it did not run."""
        return 0.0 if self.result is None else self.result.ratio

    @property
    def flags(self) -> str:
        """The setting as options of a command; the size of images is an option of the model."""
        return flags_of({name: x for name, x in self.settings.items() if name != "input"})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = ("dense_ms", "sparse_ms", "ratio", "ratio_quartiles")
        measured = {name: getattr(self.result, name, None) for name in figures}
        about = {"settings": dict(self.settings), "options": self.flags}
        return {**about, **measured, "reason": self.reason}


def heading(name: str, result: BenchResult, strategy: str = "") -> str:
    """What was timed, and where."""
    from sparsiattn.patching.text import shape_text

    what = f"{name}, {strategy}" if strategy else name
    shape = shape_text(result.input_shape)
    rounds = f"{result.rounds} paired run{'' if result.rounds == 1 else 's'}"
    return f"{what}, input {shape}, {result.dtype} on {result.device}, {rounds}"


def compared(
    request: ModelRequest, place: dict[str, Any], batch_size: int, rounds: int
) -> tuple[dict[str, Any], list[Any]]:
    """Each setting timed, as a JSON document, which is that of the fastest, and as a text."""
    from sparsiattn.analysis.recommendation.short_list import short_list

    model = request.create(weights_matter=False).eval().to(**place)
    images = noise(model, request.image_size, batch_size)
    settings = short_list(model, images)
    timed = sorted(_timed(model, images, settings, rounds), key=lambda one: -one.ratio)
    fastest = timed[0].result
    if fastest is None:
        raise NothingToPatch(
            f"{request.model} refuses every setting; {timed[0].flags}: {timed[0].reason}"
        )
    document = {
        **fastest.to_dict(),
        "name": request.model,
        "options": timed[0].flags,
        "short_list": [one.to_dict() for one in timed],
    }
    return document, [heading(request.model, fastest), *_text(_words(request, fastest), timed)]


def _timed(model: Any, images: Any, settings: list[Any], rounds: int) -> list[Timed]:
    from sparsiattn import bench
    from sparsiattn.training.progress import bar

    timed = []
    with bar("settings", len(settings), shown=sys.stderr.isatty()) as progress:
        for options in settings:
            try:
                result = bench(model, images, rounds=rounds, sites=False, **options)
                timed.append(Timed(options, result))
            except SparsiattnError as error:
                timed.append(Timed(options, reason=str(error)))
            progress(len(timed))
    return timed


def _text(words: str, timed: list[Timed]) -> list[Any]:
    """A table, what was refused, and what to do next."""
    rows: list[tuple[str, ...]] = [("setting", "dense", "patched", "speed-up", "quartiles")]
    for one in timed:
        if one.result is not None:
            low, high = one.result.ratio_quartiles
            times = (f"{ms:.2f} ms" for ms in (one.result.dense_ms, one.result.sparse_ms))
            rows.append((one.flags, *times, f"{one.ratio:.2f}x", f"{low:.2f} to {high:.2f}x"))
    refused = [f"not possible: {one.flags}: {one.reason}" for one in timed if one.reason]
    return [rows, *refused, _next(words, timed[0].ratio)]


def _words(request: ModelRequest, result: BenchResult) -> str:
    """The model, and how it was timed, as another command takes them."""
    place = {"device": (result.device, "cpu"), "dtype": (result.dtype, "float32")}
    given = [f" --{name} {value}" for name, (value, default) in place.items() if value != default]
    return request.model_words() + "".join(given)


def _next(words: str, ratio: float) -> str:
    """What to do with the figures; ``words`` say the model as a command takes it."""
    if ratio <= 1.0:
        return "none of these is faster than the dense model here; larger images may be"
    goal = max(1.1, round(0.9 * ratio, 1))
    return (
        "this is speed alone; what a setting loses: "
        f"sparsiattn recommend {words} --data FOLDER --speedup {goal}"
    )
