"""`profile`: count the MACs of a model, dense and patched, while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparsiattn.analysis.benchmark.sites import measure_sites
from sparsiattn.analysis.benchmark.whole_model import time_model
from sparsiattn.analysis.profiling.account import Account
from sparsiattn.analysis.profiling.accounting import ACCOUNTINGS, Accounting
from sparsiattn.analysis.profiling.module_map import batch_of, map_modules
from sparsiattn.analysis.profiling.result import Latency, Profile
from sparsiattn.analysis.profiling.run import Run
from sparsiattn.analysis.unpatched import patches_in
from sparsiattn.errors import InvalidOption
from sparsiattn.patching import MetaInputs, Patch, eval_mode, patch_of
from sparsiattn.patching.model_call import arguments
from sparsiattn.patching.survey import refresh
from sparsiattn.patching.warmup import unchanged
from sparsiattn.runtime import Timing, settings
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.runtime.timing import Quartiles


def profile(
    model: nn.Module,
    input: Any,
    *,
    accounting: Accounting = "own",
    memory: bool = False,
    latency: bool = False,
    rounds: int = 10,
) -> Profile:
    """Count the MACs of a model and of its patch, by part and by site, while it runs.

    The model runs once patched and once dense, in eval mode and without gradients, under
    `torch.utils.flop_counter`. Modes, hooks, weights, random state and the patch are restored.

    Args:
        model: The model, patched or not.
        input: An image batch ``[B, C, H, W]``, a dict of keyword arguments or a tuple of positional
            arguments, on the model's device. Figures are for one image.
        accounting: Accounting rule of the headline figures: ``"own"``, ``"computed"`` or
            ``"paper"`` (see `Profile`, which contains all three).
        memory: Whether to measure peak memory of both passes with torch's profiler.
        latency: Whether to time both passes and each site, as `bench` does.
        rounds: Number of paired runs for ``latency``.

    Returns:
        MACs, and time and memory if requested.

    Raises:
        InvalidType: ``input`` is not an input of a model.
        InvalidOption: The model does not accept ``input``, or an option is invalid.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, "local", k=0.25):
    ...     cost = sparsiattn.profile(model, tiny_images(1))
    >>> cost.tokens, cost.mhsa_macs < cost.mhsa_macs_dense, cost.macs < cost.macs_dense
    ((65, 65), True, True)
    """
    if accounting not in ACCOUNTINGS:
        raise InvalidOption(f"accounting must be one of {ACCOUNTINGS}, got {accounting!r}")
    model = unwrap(model)
    model_arguments = arguments(input, "profile")
    batch_of(model_arguments)
    patches = _active_patches(model)
    times = _latency(model, patches, model_arguments, rounds) if latency else None
    with _undisturbed(model, patches):
        run = Run(model, model_arguments, map_modules(model, patches, model_arguments), patches)
        dense = run.count(dense=True)
        patched = run.count() if patches else dense
        peaks = run.peaks() if memory else None
    return Account(run, dense, patched).profile(accounting, times, peaks)


def _active_patches(model: nn.Module) -> list[Patch]:
    """Active patches of the model and of its submodules, each once."""
    patches = patches_in(model)
    for patch in patches:
        patch.ensure_active("profile")
        refresh(patch)
        if patch.key in settings.disabled or settings.observer is not None:
            raise InvalidOption(
                "profile() inside disabled() or observing() would count dense attention twice; "
                "leave that block first"
            )
    return patches


@contextmanager
def _undisturbed(model: nn.Module, patches: list[Patch]) -> Iterator[None]:
    """Eval mode without gradients inside the block; all state is restored afterwards."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        stack.enter_context(eval_mode(model))
        for patch in patches:
            stack.enter_context(unchanged(patch))
        # the fast path of `nn.MultiheadAttention` is one operation, which cannot be counted
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _latency(
    model: nn.Module, patches: list[Patch], model_arguments: MetaInputs, rounds: int
) -> Latency:
    """Paired runs as in `bench`; the sites of a patch are measured too."""
    patch = patch_of(model)
    if patches and patch is None:
        raise InvalidOption(
            "latency=True needs a model that is patched itself, but here only a part of it is: "
            "profile that part"
        )
    times = time_model(model, patch, model_arguments, rounds)
    dense = Quartiles.of(times["dense"]).ms()
    if patch is None:
        return Latency(rounds, *dense)
    args, kwargs = model_arguments
    measure_sites(patch, kwargs or args)
    paired = Timing.of(times["sparse"], times["dense"])
    return Latency(rounds, *dense, *paired.first.ms(), ratio=paired.ratio.rounded(4)[0])
