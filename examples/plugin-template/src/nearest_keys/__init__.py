"""A strategy and a kernel for sparsiattn, registered through this package's entry point."""

from __future__ import annotations

from sparsiattn import Kernel, Strategy, hookimpl

from nearest_keys.kernel import NearestKeysSoftmax
from nearest_keys.strategy import NearestKeys

# version of sparsiattn.PLUGIN_API that this package was written for
SPARSIATTN_API = (1, 0)


@hookimpl
def sparsiattn_strategies() -> list[type[Strategy]]:
    return [NearestKeys]


@hookimpl
def sparsiattn_kernels() -> list[Kernel]:
    return [NearestKeysSoftmax()]
