"""`profile`: what a model costs, dense and patched, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsiattn.analysis.profiling.account import Account
from sparsiattn.analysis.profiling.accounting import ACCOUNTINGS, Accounting
from sparsiattn.analysis.profiling.memory import peak_bytes
from sparsiattn.analysis.profiling.meter import EnterSection, LeaveSection, MacCounter
from sparsiattn.analysis.profiling.module_map import ModuleMap, anatomy, batch_of, patched_sites
from sparsiattn.analysis.profiling.result import Latency, Memory, Profile
from sparsiattn.errors import InvalidOption, SparsiattnError
from sparsiattn.patching.apply import live_patches
from sparsiattn.patching.discovery.probe import DryInputs
from sparsiattn.patching.model_call import arguments, eval_mode
from sparsiattn.patching.warmup import unchanged
from sparsiattn.runtime import timing
from sparsiattn.runtime.handle import Patch, patch_of, unwrap
from sparsiattn.runtime.sdpa_intercept import THREAD
from sparsiattn.runtime.site_runtime import SiteRuntime


def profile(
    model: nn.Module,
    input: Any,
    *,
    accounting: Accounting = "own",
    memory: bool = False,
    latency: bool = False,
    rounds: int = 10,
) -> Profile:
    """MACs of a model and of its patch, by part and by site, counted from what runs.

    model: patched or not. input: an image batch ``[B, C, H, W]``, a dict of keyword arguments or a
    tuple of positional ones, on the model's device; figures are for one image. The model runs once
    as it is and once dense, in eval mode and without gradients, under `torch.utils.flop_counter`.
    accounting: ``"own"``, ``"computed"`` or ``"paper"``, by which the headline figures count (see
    `Profile`; all three are in it). memory: also run both under torch's profiler, for peak memory.
    latency: also time both, ``rounds`` paired runs, and each site, as `bench` does.

    Modes, hooks, weights, random numbers and the patch stay as they are. Raises `InvalidType` or
    `InvalidOption` for an input that is none or that the model does not take.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, "local", k=0.25):
    ...     found = sparsiattn.profile(model, tiny_images(1))
    >>> found.tokens, found.mhsa_macs < found.mhsa_macs_dense, found.macs < found.macs_dense
    ((65, 65), True, True)
    """
    if accounting not in ACCOUNTINGS:
        raise InvalidOption(f"accounting must be one of {ACCOUNTINGS}, got {accounting!r}")
    model = unwrap(model)
    given = arguments(input, "profile")
    batch_of(given)
    live = _live(model)
    timed = _timed(model, live, given, rounds) if latency else None
    with _as_found(model, live):
        shape = anatomy(model, live, given)
        run = Run(model, given, shape, live)
        dense = run.count(off=True)
        patched = run.count() if live else dense
        peaks = run.peaks() if memory else None
    return Account(run, dense, patched).profile(accounting, timed, peaks)


def _live(model: nn.Module) -> list[Patch]:
    """Patches of the model and of its parts, each once."""
    found = list({id(one): one for _, one in live_patches(model)}.values())
    for patch in found:
        patch._require_active("profile")
        if patch.key in THREAD.disabled or THREAD.observer is not None:
            raise InvalidOption(
                "profile() inside disabled() or observing() would count dense attention twice; "
                "leave that block first"
            )
    return found


@contextmanager
def _as_found(model: nn.Module, live: list[Patch]) -> Iterator[None]:
    """Eval mode without gradients, in which `nn.MultiheadAttention` runs operations that can be
    counted; everything is afterwards what it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        stack.enter_context(eval_mode(model))
        for patch in live:
            stack.enter_context(unchanged(patch))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@dataclass(frozen=True)
class Run:
    """One input and the model that takes it."""

    model: nn.Module
    given: DryInputs
    anatomy: ModuleMap
    live: list[Patch]

    @property
    def runtimes(self) -> dict[str, SiteRuntime]:
        """Patched sites by their path in this model."""
        return patched_sites(self.model, self.live)

    def call(self, off: bool = False) -> Any:
        args, kwargs = self.given
        with ExitStack() as stack:
            for patch in self.live if off else ():
                stack.enter_context(patch.disabled())
            return self.model(*args, **kwargs)

    def count(self, off: bool = False) -> MacCounter:
        """One forward pass under a meter; off: as if unpatched."""
        names = {(one.owner.key, one.site.name): path for path, one in self.runtimes.items()}
        meter = MacCounter(names)
        hooks: list[Any] = []
        try:
            for path, section in self.anatomy.sections():
                module = self.model.get_submodule(path)
                enter, leave = EnterSection(meter, section), LeaveSection(meter, section)
                hooks.append(module.register_forward_pre_hook(enter, prepend=True))
                hooks.append(module.register_forward_hook(leave, always_call=True))
            with meter.counting():
                self._tried(off)
        finally:
            for hook in hooks:
                hook.remove()
        return meter

    def _tried(self, off: bool) -> None:
        """The first thing to run: what the host refuses is the input."""
        try:
            self.call(off)
        except (SparsiattnError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            given = tuple(batch_of(self.given).shape)
            raise InvalidOption(
                f"{type(self.model).__name__} fails on this input, a tensor of shape {given}: "
                f"{type(error).__name__}: {error}. Pass what the model takes, on its device"
            ) from error

    def peaks(self) -> Memory:
        device = batch_of(self.given).device
        dense = peak_bytes(lambda: self.call(off=True), device)
        return Memory(dense, peak_bytes(self.call, device) if self.live else dense)


def _timed(model: nn.Module, live: list[Patch], given: DryInputs, rounds: int) -> Latency:
    """Paired runs as `bench` makes them, which also measures the sites of a patch."""
    from sparsiattn.analysis.benchmark.whole_model import bench

    if live and patch_of(model) is None:
        raise InvalidOption(
            "latency=True needs the model that carries the patch, and here a part of it does: "
            "profile that part"
        )
    args, kwargs = given
    if live:
        found = bench(model, kwargs or args, rounds=rounds)
        return Latency(
            found.rounds, found.dense_ms, found.dense_quartiles, found.sparse_ms,
            found.sparse_quartiles, found.ratio,
        )  # fmt: skip
    if type(rounds) is not int or rounds < 1:
        raise InvalidOption(f"rounds must be an int >= 1, got {rounds!r}")
    with eval_mode(model), torch.inference_mode():
        call: Callable[[], Any] = lambda: model(*args, **kwargs)  # noqa: E731
        times = timing.alternate({"dense": call}, rounds)["dense"]
    middle = timing.compared(times, times)["first_ms"]
    return Latency(rounds, middle, timing.quartiles_ms(times))
