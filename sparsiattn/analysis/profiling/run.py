"""`Run`: forward passes of a model for counting."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsiattn.analysis.profiling.memory import peak_bytes
from sparsiattn.analysis.profiling.meter import MacCounter
from sparsiattn.analysis.profiling.module_map import ModuleMap, batch_of, patched_sites
from sparsiattn.analysis.profiling.result import Memory
from sparsiattn.errors import InvalidOption, SparsiattnError
from sparsiattn.patching import MetaInputs, Patch
from sparsiattn.runtime.patch_state import hook_idle_sites
from sparsiattn.runtime.site_runtime import SiteRuntime


@dataclass(frozen=True)
class Run:
    """A model and one input.

    Attributes:
        model: The model, without wrappers.
        arguments: The arguments of its forward pass.
        module_map: The modules of its attention and its MLPs.
        patches: Active patches of the model and of its submodules.
    """

    model: nn.Module
    arguments: MetaInputs
    module_map: ModuleMap
    patches: list[Patch]

    @property
    def runtimes(self) -> dict[str, SiteRuntime]:
        """Patched sites by their path in this model."""
        return patched_sites(self.model, self.patches)

    def call(self, dense: bool = False) -> Any:
        """Run one forward pass, with patches disabled if ``dense``."""
        args, kwargs = self.arguments
        with ExitStack() as stack:
            for patch in self.patches if dense else ():
                stack.enter_context(patch.disabled())
            return self.model(*args, **kwargs)

    def count(self, dense: bool = False) -> MacCounter:
        """Run one forward pass, and count its MACs.

        Raises:
            InvalidOption: The model does not accept the input.
        """
        runtimes = self.runtimes.items()
        counter = MacCounter(
            {(runtime.owner.key, runtime.site.name): path for path, runtime in runtimes}
        )
        for patch in self.patches:
            hook_idle_sites(patch)
        with ExitStack() as stack:
            for path, section in self.module_map.sections():
                stack.enter_context(counter.watching(self.model.get_submodule(path), section))
            stack.enter_context(counter.counting())
            try:
                self.call(dense)
            except (SparsiattnError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # in this first run, an error is due to the input
                raise InvalidOption(
                    f"{type(self.model).__name__} fails on this input, a tensor of shape "
                    f"{tuple(batch_of(self.arguments).shape)}: {type(error).__name__}: {error}. "
                    "Pass an input that the model accepts, on its device"
                ) from error
        return counter

    def peaks(self) -> Memory:
        """Peak memory of both forward passes."""
        device = batch_of(self.arguments).device
        dense = peak_bytes(lambda: self.call(dense=True), device)
        return Memory(dense, peak_bytes(self.call, device) if self.patches else dense)
