"""Random calls of compiled code in a process of its own; prints how many there were.

The test that runs it has the sanitizers compiled in, which end the process at the first error.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import torch

from sparsiattn import AttentionInputs, Pattern
from sparsiattn.attention import KeyLists, TopLogits
from sparsiattn.kernels import Native, compile_native
from sparsiattn.kernels.native import build, toolchain
from sparsiattn.kernels.workspace import SCRATCH
from sparsiattn.strategies import Connectivity, finish
from tests.support.host_masks import HALVES, KINDS, Case

TILES = (1, (1, 2), (2, 2), (4, 4), (5, 3), (8, 8), (9, 9))
DIMS = (1, 4, 13, 16, 64, 72, 80, 100, 256)


def one_call(draw: random.Random) -> None:
    """Plan and attend, in rooms that are no larger than they must be."""
    case = Case(
        grid=(draw.randint(1, 12), draw.randint(2, 12)),
        prefix=draw.randint(0, 3),
        dims=(draw.choice(DIMS), draw.choice(DIMS)),
        kind=draw.choice(KINDS),
        lead=(draw.choice((1, 2)), draw.choice((1, 3))),
        dtype=draw.choice((torch.float32, *HALVES)),
        seed=draw.randint(0, 999),
    ).as_sam()
    tile, block = draw.choice(TILES), draw.choice((1, (2, 2), (4, 3)))
    inputs = case.inputs(tile=tile, block=block)
    keep, background = draw.randint(1, inputs.n_keys), draw.choice((None, 1, 3, 12))
    scores = torch.rand(2, 3, inputs.n_keys, inputs.n_keys)
    wishes = [TopLogits.of(inputs, keep), Pattern.top(scores, keep)]
    if tile != 1 and block != 1 and inputs.bias is None:
        strategy = Connectivity(k=keep, tile=tile, block=block, scores="predictor")
        wishes.append(strategy.planner(inputs.site)(inputs))
    for wish in wishes:
        SCRATCH.clear()
        pattern = finish(wish, inputs, background=background)
        if not isinstance(pattern, KeyLists):
            continue
        if Native().why_not(inputs, pattern):
            pattern = replace(pattern, summary=None)  # type: ignore[type-var]
        assert Native().why_not(inputs, pattern) == []
        SCRATCH.clear()
        Native()(inputs, pattern)
        train(inputs, pattern)


def train(inputs: AttentionInputs, pattern: Pattern) -> None:
    """A pass of the same call with its gradient."""
    with torch.enable_grad():
        q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        trained = inputs.replace(q=q, k=k, v=v)
        if Native().why_not(trained, pattern):  # lists of best keys, under another summary
            return
        SCRATCH.clear()
        out = Native()(trained, pattern)
        SCRATCH.clear()
        out.sum().backward()


def main(calls: str, threads: str, processor: str) -> None:
    torch.set_num_threads(int(threads))
    build._flag = lambda: f"-march={processor}"
    toolchain.SECONDS = 600  # sanitizers take long, more so beside other tests
    failure = compile_native()
    assert failure is None, failure
    draw = random.Random(0)
    with torch.no_grad():
        for _ in range(int(calls)):
            one_call(draw)
    print(calls)


if __name__ == "__main__":
    main(*sys.argv[1:])
