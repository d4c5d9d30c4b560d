"""The built-in strategies."""

from __future__ import annotations

from sparsiattn.hookspecs import hookimpl
from sparsiattn.strategies.connectivity import Connectivity
from sparsiattn.strategies.dense import DenseStrategy
from sparsiattn.strategies.local import Local
from sparsiattn.strategies.random import Random
from sparsiattn.strategies.topk import TopK
from sparsiattn.strategy import Strategy


@hookimpl
def sparsiattn_strategies() -> list[type[Strategy]]:
    return [DenseStrategy, TopK, Random, Local, Connectivity]
