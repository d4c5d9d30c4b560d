"""Strategies: their contracts, the built-in ones, and `finalize`, which finishes their plans.

They import `kernels`, `attention`, `registry` and `errors`. `runtime`, `serialization`, `patching`
and what stands above these import them; `methods` and plug-ins take public names from the root.
"""

from __future__ import annotations

import sys

from sparsiattn.registry.deprecated import CallablePackage
from sparsiattn.registry.hookspecs import hookimpl
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.connectivity import Connectivity
from sparsiattn.strategies.dense import DenseStrategy
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.strategies.local import Local
from sparsiattn.strategies.random import Random
from sparsiattn.strategies.token_drop import TokenDrop
from sparsiattn.strategies.token_merge import TokenMerge
from sparsiattn.strategies.topk import TopK

# Until the next minor version `sparsiattn.strategies()` lists what is registered.
sys.modules[__name__].__class__ = CallablePackage


@hookimpl
def sparsiattn_strategies() -> list[type[Config]]:
    return [DenseStrategy, TopK, Random, Local, Connectivity, TokenDrop, TokenMerge, Hybrid]
