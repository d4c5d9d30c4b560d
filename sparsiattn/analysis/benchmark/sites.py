"""The speed of each site, measured: dense attention against planning and kernel, in alternation."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.patterns import Dense
from sparsiattn.attention.site import AttentionInputs, Site
from sparsiattn.kernels.base import choose
from sparsiattn.patching.model_call import arguments, eval_mode
from sparsiattn.runtime import timing
from sparsiattn.runtime.handle import Patch
from sparsiattn.runtime.sdpa_intercept import dense_attention
from sparsiattn.runtime.site_runtime import SiteRuntime, notify_planner
from sparsiattn.strategies.base import Planner


def measure_sites(patch: Patch, input: Any, *, rounds: int = 7) -> dict[str, float]:
    """Speed of every sparse site of ``patch`` relative to its own dense attention, planning paid,
    over so many ``rounds``.

    The patched model runs once on ``input`` (an image batch, or a tuple or dict of arguments) with
    dense attention; at each site dense attention and planning with kernel run alternately on what
    reaches it, and the ratio of their median times is stored, so that reports show it. A site
    that calls attention more than once in a forward pass counts all its calls. Sites left dense
    are not in the result. Neither gradients nor the model's state are touched.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
    ...     sorted(measure_sites(patch, tiny_images(), rounds=1))
    ['blocks.0.attn', 'blocks.1.attn']
    """
    patch._require_active("measure_sites")
    by_name = {runtime.site.name: runtime for runtime in patch.runtimes}
    spent: dict[str, tuple[float, float]] = {}

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        runtime = by_name[site.name]
        if runtime.idle(inputs.n_keys):
            return
        took = _seconds(runtime, planner, inputs, rounds)
        if took is not None:
            before = spent.get(site.name, (0.0, 0.0))
            spent[site.name] = (before[0] + took[0], before[1] + took[1])

    args, kwargs = arguments(input, "measure_sites")
    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(*args, **kwargs)
    ratios = {name: dense / sparse for name, (dense, sparse) in spent.items()}
    for name, ratio in ratios.items():
        by_name[name].measured = ratio
    return ratios


def tensors_of(given: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    """Tensors among `sparsiattn.patching.model_call.arguments`, in order."""
    args, kwargs = given
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _seconds(
    runtime: SiteRuntime, planner: Planner, inputs: AttentionInputs, rounds: int
) -> tuple[float, float] | None:
    """Median seconds of dense attention and of planning with kernel; None if all keys are kept."""
    pattern = runtime.finish(planner(inputs), inputs)
    if isinstance(pattern, Dense):
        if hasattr(planner, "after"):
            q, k, v = inputs.q, inputs.k, inputs.v
            notify_planner(
                planner, inputs, dense_attention(q, k, v, inputs.bias, scale=inputs.scale)
            )
        return None
    kernel = choose(runtime.kernels, inputs, pattern, explicit=runtime.explicit).kernel
    q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense_attention(q, k, v, bias, inputs.dropout, scale=inputs.scale),
        "sparse": lambda: kernel(inputs, runtime.finish(planner(inputs), inputs)),
    }
    times = timing.alternate(calls, rounds)
    return median(times["dense"]), median(times["sparse"])
