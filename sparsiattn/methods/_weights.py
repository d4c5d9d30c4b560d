"""Initial weights of planners, deterministic for each site.

They come from private generators, so that patching does not change the global random state.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn


def generator(name: str) -> torch.Generator:
    """A generator that is seeded by the name of a site."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def frozen(weight: Tensor) -> nn.Parameter:
    """A parameter without gradient; `calibrate` and `train` unfreeze it while they run."""
    return nn.Parameter(weight, requires_grad=False)


def linear(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    """A linear layer with weights uniform in +-1/sqrt(inputs), and zero bias."""
    # the constructor of nn.Linear would draw from the global generator
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        bound = 1 / math.sqrt(inputs)
        layer.weight.uniform_(-bound, bound, generator=random)
        layer.bias.zero_()
    return layer
