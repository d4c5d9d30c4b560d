"""`bench`: the whole model, dense and patched, in paired runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsiattn.analysis.benchmark.sites import measure_sites, tensors_of
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import patch
from sparsiattn.patching.model_call import arguments, eval_mode
from sparsiattn.patching.report import Report
from sparsiattn.runtime import timing
from sparsiattn.runtime.handle import Patch, patch_of, unwrap
from sparsiattn.strategies.config import Config


@dataclass(frozen=True)
class BenchResult:
    """Paired timings of one model. ratio: dense time over patched time, the median over rounds
    (more is faster), ratio_quartiles: its quartiles. dense_ms, sparse_ms: medians in milliseconds
    per forward pass, dense_quartiles, sparse_quartiles: theirs. strategy, input_shape, dtype,
    device: what was timed. report: of the patch, after the runs. machine: versions and hardware.

    ``print`` it, or take `to_dict`.
    """

    model: str
    strategy: str
    input_shape: tuple[int, ...]
    dtype: str
    device: str
    rounds: int
    dense_ms: float
    dense_quartiles: tuple[float, float]
    sparse_ms: float
    sparse_quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    report: Report
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "report": self.report.to_dict()}

    def __str__(self) -> str:
        low, high = self.ratio_quartiles
        shape = "x".join(map(str, self.input_shape))
        return (
            f"{self.model}, {self.strategy}, input {shape}, {self.dtype} on {self.device}: "
            f"dense {self.dense_ms:.2f} ms, patched {self.sparse_ms:.2f} ms, {self.ratio:.2f}x "
            f"(quartiles {low:.2f} to {high:.2f} of {self.rounds} rounds)"
        )


def bench(
    model: nn.Module,
    input: Any,
    *,
    strategy: str | Config | None = None,
    rounds: int = 10,
    sites: bool = True,
    progress: Callable[[int], Any] | None = None,
    **options: Any,
) -> BenchResult:
    """Time a model dense and patched, alternately, under `torch.inference_mode`.

    input: an image batch, or a tuple or dict of arguments, on the model's device. The model is
    measured with the patch it carries; one without is patched for the time being, with
    ``strategy`` and ``options`` as `patch` takes them. The dense side is a copy without any hook
    that shares all weights (of a compiled or parallel model: the same under `Patch.disabled`).
    sites: also measure every site's attention alone, for the report. progress: called with the
    rounds done.

    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> found = bench(tiny_vit(), tiny_images(), strategy="topk", k=0.25, rounds=2)
    >>> found.ratio > 0, found.input_shape
    (True, (3, 3, 32, 32))
    """
    if type(rounds) is not int or rounds < 1:
        raise InvalidOption(f"rounds must be an int >= 1, got {rounds!r}")
    args, kwargs = arguments(input, "bench")
    with _patched(model, strategy, options) as live, eval_mode(live.model):
        dense = _dense(model, live)
        calls = {
            "dense": lambda: dense(*args, **kwargs),
            "sparse": lambda: model(*args, **kwargs),
        }
        with torch.inference_mode():
            times = timing.alternate(calls, rounds, progress)
        if sites:
            measure_sites(live, input)
        return _result(live, (args, kwargs), times)


@contextmanager
def _patched(
    model: nn.Module, strategy: str | Config | None, options: dict[str, Any]
) -> Iterator[Patch]:
    live = patch_of(model)
    if live is None:
        made = patch(model, "connectivity" if strategy is None else strategy, **options)
        try:
            yield made
        finally:
            made.unpatch()
        return
    if strategy is not None or options:
        raise InvalidOption(
            f"the model carries {live!r}: bench() measures that and takes neither strategy nor "
            f"options, got {strategy!r} and {sorted(options)}; call unpatch() first"
        )
    yield live


def _dense(model: nn.Module, live: Patch) -> Callable[..., Any]:
    """The unpatched model, on the same weights."""
    if unwrap(model) is not model:

        def disabled(*args: Any, **kwargs: Any) -> Any:
            with live.disabled():
                return model(*args, **kwargs)

        return disabled
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    copied = patch_of(twin)
    assert copied is not None
    return copied.unpatch()


def _result(live: Patch, given: Any, times: dict[str, list[float]]) -> BenchResult:
    first = next(iter(tensors_of(given)), None)
    pair = timing.compared(times["sparse"], times["dense"])
    dense, sparse = (timing.quartiles_ms(times[side]) for side in ("dense", "sparse"))
    like = next(live.model.parameters(), first)
    return BenchResult(
        model=type(live.model).__name__,
        strategy=live.strategy.name,
        input_shape=live.input_shape if first is None else tuple(first.shape),
        dtype="unknown" if like is None else str(like.dtype).removeprefix("torch."),
        device="unknown" if like is None else str(like.device),
        rounds=pair["rounds"],
        dense_ms=pair["second_ms"],
        dense_quartiles=dense,
        sparse_ms=pair["first_ms"],
        sparse_quartiles=sparse,
        ratio=pair["ratio"],
        ratio_quartiles=tuple(pair["ratio_quartiles"]),
        report=live.report(),
        machine=timing.machine(),
    )
