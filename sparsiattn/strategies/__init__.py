"""Strategies decide which keys each query attends to, or which tokens to keep.

The package has the contracts and the built-in strategies. It may import `sparsiattn.kernels` and
the layers below it; the runtime and all layers above may import it. Published methods are plug-ins
that use the public names: `sparsiattn.methods`.
"""

from __future__ import annotations

import sys

from sparsiattn.registry.deprecated import CallablePackage
from sparsiattn.registry.hookspecs import hookimpl
from sparsiattn.strategies.base import Budgets, LearnedPlanner, Planner, Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.connectivity import Connectivity
from sparsiattn.strategies.dense import DenseStrategy
from sparsiattn.strategies.finalize import finish
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.strategies.keep_predictor import KeepPredictor
from sparsiattn.strategies.local import Local
from sparsiattn.strategies.random import Random, hash_integers
from sparsiattn.strategies.reduction import KeepRagged, Policy, Reduction
from sparsiattn.strategies.token_base import (
    LearnedTokenPlanner,
    TokenInputs,
    TokenPlanner,
    TokenStrategy,
)
from sparsiattn.strategies.token_drop import TokenDrop
from sparsiattn.strategies.token_merge import TokenMerge
from sparsiattn.strategies.topk import TopK

# Until the next minor version `sparsiattn.strategies()` lists the registered strategies.
sys.modules[__name__].__class__ = CallablePackage


@hookimpl
def sparsiattn_strategies() -> list[type[Config]]:
    return [DenseStrategy, TopK, Random, Local, Connectivity, TokenDrop, TokenMerge, Hybrid]
