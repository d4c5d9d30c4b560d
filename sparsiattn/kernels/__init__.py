"""Kernels, which compute one attention call from a pattern: contract, choice and built-ins.

`reference` is the specification and `sdpa` applies a mask. `gather` (plain torch), `native` (C, for
CPUs) and `triton` (CUDA) compute the kept keys only; `flex` does so through FlexAttention.
`xformers` and `varlen` take ragged batches on CUDA, `flash_attn_4` key blocks on Hopper, `natten`
windows. The package may import `sparsiattn.attention` and `sparsiattn.registry`; strategies and all
layers above may import it.
"""

from __future__ import annotations

import sys

from sparsiattn.kernels.base import Choice, Kernel, choose, refusals
from sparsiattn.kernels.choice_cache import ChoiceCache
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.flash import FlashAttention4
from sparsiattn.kernels.flex import Flex
from sparsiattn.kernels.gather import Gather
from sparsiattn.kernels.native.kernel import Native, compile_native
from sparsiattn.kernels.natten import Natten
from sparsiattn.kernels.prices import Prices, Work
from sparsiattn.kernels.reference import Reference
from sparsiattn.kernels.sdpa import MaskedSDPA
from sparsiattn.kernels.triton import Triton
from sparsiattn.kernels.varlen import Varlen
from sparsiattn.kernels.warmup import warm_kernels
from sparsiattn.kernels.xformers import XFormers
from sparsiattn.registry.deprecated import CallablePackage
from sparsiattn.registry.hookspecs import hookimpl

sys.modules[__name__].__class__ = CallablePackage


@hookimpl
def sparsiattn_kernels() -> list[Kernel]:
    return [
        Reference(),
        MaskedSDPA(),
        Gather(),
        Native(),
        Flex(),
        Triton(),
        XFormers(),
        Varlen(),
        FlashAttention4(),
        Natten(),
    ]
