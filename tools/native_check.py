"""Compare every compiled library of the installed package that this processor supports.

Each one must give the same results as the kernel `reference`.

python tools/native_check.py
"""

from __future__ import annotations

import os
import sys

import torch

from sparsiattn import Pattern
from sparsiattn.kernels import Native, Reference
from sparsiattn.kernels.native import build, shipped
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs


def check(level: str) -> None:
    """Raise if a level's library is missing or gives other results than the reference."""
    os.environ[shipped.VARIABLE] = level
    build.forget()
    if not build.is_ready():
        raise SystemExit(f"{level or 'no level'}: {build.problem()}")
    for dim, tile in ((16, (2, 3)), (64, (4, 4)), (72, 1)):
        inputs = random_inputs((9, 10), prefix=2, dim=dim, tile=tile, block=(2, 2))
        scores = torch.rand(2, 3, inputs.n_keys, inputs.n_keys)
        pattern = finish(Pattern.top(scores, 29), inputs, background=2)
        out, exact = Native()(inputs, pattern), Reference()(inputs, pattern)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)
    print(f"{level or 'chosen'}: {build.source()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    torch.manual_seed(0)
    suiting, problem = shipped._suiting()
    if problem:
        sys.exit(problem)
    for level in (*suiting, ""):
        check(level)
