"""Kernels, which compute patterns; their prices, their choice, and the tuning file.

Strategies and all layers above them may import this package; it imports `attention`, `registry` and
`errors` only. It is also the plug-in that registers the built-in kernels.
"""

from __future__ import annotations

import sys

from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.flex import Flex
from sparsiattn.kernels.gather import Gather
from sparsiattn.kernels.native.kernel import Native
from sparsiattn.kernels.reference import Reference
from sparsiattn.kernels.sdpa import MaskedSDPA
from sparsiattn.kernels.triton import Triton
from sparsiattn.kernels.varlen import Varlen
from sparsiattn.kernels.xformers import XFormers
from sparsiattn.registry.deprecated import CallablePackage
from sparsiattn.registry.hookspecs import hookimpl

sys.modules[__name__].__class__ = CallablePackage


@hookimpl
def sparsiattn_kernels() -> list[Kernel]:
    return [Reference(), MaskedSDPA(), Gather(), Native(), Flex(), Triton(), XFormers(), Varlen()]
