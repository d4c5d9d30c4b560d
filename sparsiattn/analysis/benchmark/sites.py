"""Measure the speed of each site: dense attention against planning and kernel, alternately."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import AttentionInputs, Dense, Site, dense_attention
from sparsiattn.kernels import Choice, choose
from sparsiattn.patching import Patch, eval_mode
from sparsiattn.patching.model_call import arguments
from sparsiattn.patching.survey import refresh
from sparsiattn.runtime import Timing, timing
from sparsiattn.runtime.site_runtime import SiteRuntime, notify_planner
from sparsiattn.strategies import Planner


def measure_sites(patch: Patch, input: Any, *, rounds: int = 7) -> dict[str, float]:
    """Measure every sparse site of a patch against its own dense attention, planning included.

    The patched model runs once with dense attention. At each site, dense attention alternates with
    planning and kernel on the same inputs. The ratio of the median times is stored, and reports
    show it for calls with the same kernel, shape and number of threads. A site that calls attention
    more than once in a forward pass counts all its calls. Gradients and the model's state are not
    changed.

    Args:
        patch: The active patch.
        input: An image batch, or a tuple or dict of arguments.
        rounds: Number of paired runs at each site.

    Returns:
        Speed relative to dense attention by name of the site, without sites that stay dense.

    Raises:
        InvalidOption: ``rounds`` is not a positive int.
        InvalidType: ``input`` is not an input of a model.
        ModelChanged: The patch was undone.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
    ...     sorted(measure_sites(patch, tiny_images(), rounds=1))
    ['blocks.0.attn', 'blocks.1.attn']
    """
    patch.ensure_active("measure_sites")
    refresh(patch)
    runtimes = {runtime.site.name: runtime for runtime in patch.runtimes}
    timings: defaultdict[str, list[Timing]] = defaultdict(list)
    choices: dict[str, Choice] = {}

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        runtime = runtimes[site.name]
        if runtime.stays_dense(inputs.n_keys):
            return
        timed = _time_call(runtime, planner, inputs, rounds)
        if timed is not None:
            choices[site.name], call_timing = timed
            timings[site.name].append(call_timing)

    args, kwargs = arguments(input, "measure_sites")
    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(*args, **kwargs)
    ratios = {
        name: sum(call.second.median for call in calls) / sum(call.first.median for call in calls)
        for name, calls in timings.items()
    }
    for name, ratio in ratios.items():
        runtimes[name].note_measured(ratio, choices[name])
    return ratios


def _time_call(
    runtime: SiteRuntime, planner: Planner, inputs: AttentionInputs, rounds: int
) -> tuple[Choice, Timing] | None:
    """The kernel, and the times of planning with it and of dense attention; None if it is dense."""
    pattern = runtime.finish(planner(inputs), inputs)

    def dense() -> Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        return dense_attention(q, k, v, inputs.bias, inputs.dropout, scale=inputs.scale)

    if isinstance(pattern, Dense):
        # planners of later sites may need the state that this one stores after attention
        if hasattr(planner, "after"):
            notify_planner(planner, inputs, dense())
        return None
    choice = choose(runtime.kernels, inputs, pattern, explicit=runtime.explicit)
    times = timing.alternate(
        {
            "dense": dense,
            "sparse": lambda: choice.kernel(inputs, runtime.finish(planner(inputs), inputs)),
        },
        rounds,
    )
    return choice, Timing.of(times["sparse"], times["dense"])
