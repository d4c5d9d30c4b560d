"""`bench`: time the whole model, dense and patched, in paired runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsiattn.analysis.benchmark.sites import measure_sites
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import patch_quietly
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.patching.model_call import arguments, eval_mode
from sparsiattn.patching.report import Report
from sparsiattn.patching.text import shape_text, speed_text
from sparsiattn.runtime import timing
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.runtime.timing import Timing
from sparsiattn.strategies.config import Config


@dataclass(frozen=True)
class BenchResult:
    """Paired timings of one model. Print it, or use `to_dict`.

    Attributes:
        model: Class name of the model.
        strategy: Name of the strategy.
        input_shape: Shape of the images.
        dtype: Data type of the model, as ``"float32"``.
        device: Device of the model.
        rounds: Number of paired runs.
        dense_ms: Median time of a dense forward pass, in milliseconds.
        dense_quartiles: First and third quartile of that time.
        sparse_ms: Median time of a patched forward pass, in milliseconds.
        sparse_quartiles: First and third quartile of that time.
        ratio: Dense time divided by patched time, the median over rounds; larger is faster.
        ratio_quartiles: First and third quartile of the ratio.
        report: The patch's report after the runs.
        machine: Versions and hardware.

    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> result = bench(tiny_vit(), tiny_images(), strategy="topk", k=0.25, rounds=2)
    >>> result.strategy, result.rounds, result.dense_ms > 0
    ('topk', 2, True)
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
        """Plain data for JSON."""
        return {**asdict(self), "report": self.report.to_dict()}

    def __str__(self) -> str:
        low, high = self.ratio_quartiles
        return (
            f"{self.model}, {self.strategy}, input {shape_text(self.input_shape)}, {self.dtype} on "
            f"{self.device}: dense {self.dense_ms:.2f} ms, patched {self.sparse_ms:.2f} ms, "
            f"{speed_text(self.ratio)} (quartiles {low:.2f} to {high:.2f} of {self.rounds} rounds)"
        )

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__


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
    """Time a model dense and patched, alternately, under `torch.no_grad`.

    A patched model is measured with its patch; an unpatched model is patched temporarily. The dense
    side is a copy without hooks that shares all weights (for a compiled or parallel model, the
    model itself inside `Patch.disabled`).

    Args:
        model: The model, patched or not.
        input: An image batch, or a tuple or dict of arguments, on the model's device.
        strategy: Strategy for an unpatched model, as in `patch`; None for ``"connectivity"``.
        rounds: Number of paired runs.
        sites: Whether to measure every site's attention separately, for the report.
        progress: Called with the number of rounds done.
        **options: Options of the strategy, as in `patch`.

    Returns:
        Times, their ratio and the patch's report.

    Raises:
        InvalidOption: ``rounds`` is not a positive int, or ``strategy`` or ``options`` were passed
            for a patched model.

    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> result = bench(tiny_vit(), tiny_images(), strategy="topk", k=0.25, rounds=2)
    >>> result.ratio > 0, result.input_shape
    (True, (3, 3, 32, 32))
    """
    model_arguments = arguments(input, "bench")
    with _patched(model, strategy, options) as patch:
        times = time_model(model, patch, model_arguments, rounds, progress)
        if sites:
            measure_sites(patch, input)
        return _result(patch, model_arguments, Timing.of(times["sparse"], times["dense"]))


def time_model(
    model: nn.Module,
    patch: Patch | None,
    model_arguments: MetaInputs,
    rounds: int,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, list[float]]:
    """Times of alternating forward passes: ``"dense"`` without, ``"sparse"`` with the patch."""
    args, kwargs = model_arguments
    with eval_mode(model if patch is None else patch.model):
        dense = model if patch is None else _without_patch(model, patch)
        calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense(*args, **kwargs)}
        if patch is not None:
            calls["sparse"] = lambda: model(*args, **kwargs)
        with torch.no_grad():
            return timing.alternate(calls, rounds, progress)


@contextmanager
def _patched(
    model: nn.Module, strategy: str | Config | None, options: dict[str, Any]
) -> Iterator[Patch]:
    """Yield the model's patch, or else a temporary one."""
    patch = patch_of(model)
    if patch is None:
        with patch_quietly(model, strategy or "connectivity", **options) as new:
            yield new
    elif strategy is None and not options:
        yield patch
    else:
        raise InvalidOption(
            f"the model is patched with {patch!r}, which bench() measures, so strategy and options "
            f"must not be passed, got {strategy!r} and {sorted(options)}; call unpatch() first"
        )


def _without_patch(model: nn.Module, patch: Patch) -> Callable[..., Any]:
    """The unpatched model with the same weights."""
    if unwrap(model) is not model:
        # a copy would have to be compiled or distributed over devices again

        def disabled(*args: Any, **kwargs: Any) -> Any:
            with patch.disabled():
                return model(*args, **kwargs)

        return disabled
    tensors = [*model.parameters(), *model.buffers()]
    model_copy = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    copied_patch = patch_of(model_copy)
    assert copied_patch is not None
    return copied_patch.unpatch()


def _result(patch: Patch, model_arguments: MetaInputs, paired: Timing) -> BenchResult:
    image = next(iter(tensors_in(model_arguments)), None)
    like = next(patch.model.parameters(), image)
    dense_ms, dense_quartiles = paired.second.ms()
    sparse_ms, sparse_quartiles = paired.first.ms()
    ratio, ratio_quartiles = paired.ratio.rounded(4)
    return BenchResult(
        model=type(patch.model).__name__,
        strategy=patch.strategy.name,
        input_shape=patch.input_shape if image is None else tuple(image.shape),
        dtype="unknown" if like is None else str(like.dtype).removeprefix("torch."),
        device="unknown" if like is None else str(like.device),
        rounds=paired.rounds,
        dense_ms=dense_ms,
        dense_quartiles=dense_quartiles,
        sparse_ms=sparse_ms,
        sparse_quartiles=sparse_quartiles,
        ratio=ratio,
        ratio_quartiles=ratio_quartiles,
        report=patch.report(),
        machine=timing.machine(),
    )
