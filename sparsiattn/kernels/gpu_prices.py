"""Prices for GPUs that were never measured: derived from published peaks, until `tune` runs.

Peaks are those of NVIDIA's data sheets and architecture papers, for dense products:

* H100 and H200: "NVIDIA H100 / H200 Tensor Core GPU" data sheets (1,979 TFLOP/s in half precision
  are with 2:4 sparsity, 989 without), and "NVIDIA H100 Tensor Core GPU Architecture";
* A100: "NVIDIA A100 Tensor Core GPU" data sheet, and "NVIDIA A100 Tensor Core GPU Architecture";
* RTX 4090: "NVIDIA Ada GPU Architecture", appendix A (half precision with float32 sums).

Exponentials per clock are those of the CUDA C++ Programming Guide (16 per multiprocessor, all of
these GPUs). How much of a peak programs reach, and the time of a launch, are assumptions, named
below. With them, dense attention in half precision reaches 486 TFLOP/s on an H100 at head dim 64
and 630 at 128; the figures of FlashAttention-3 (arXiv 2407.08608) show 413 and 595 to 617 for
cuDNN, 497 and 648 for their own kernel, 403 and 395 for Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.prices import DENSE, MASKED, PLANNING, Prices, masked_prices

LAUNCH_SECONDS = 5.5e-6
"""Time of starting one kernel of torch from Python: an assumption, by server processor."""

OPERATOR_CALLS = 10.0
"""Time of a custom operator written in Python and of its Triton launch, in kernels of torch.

It takes at most 170 us (measured without a GPU on a busy processor); a third of that is assumed.
"""

HALF_SHARE, SINGLE_SHARE = 0.9, 0.4
"""Share of the peak of products that fused attention reaches, apart from its exponentials.

In half precision on tensor cores and in float32 without TF32: assumptions.
"""

TRITON_WORTH, SINGLE_WORTH = 1.5, 2.5
"""Time of products in Triton relative to those of dense attention, in half precision and float32.

In half precision 1.4 and 1.8 at head dims 64 and 128 by the figures above; in float32, registers
spill: an assumption.
"""

CACHE_BYTES_PER_CLOCK = 2560
"""Bytes per clock from the L2 cache: half of what NVIDIA states for the A100, an assumption."""

SCORE_BYTES = 40
"""Bytes moved to choose from one score: float32, written once, and read in about nine passes."""


@dataclass(frozen=True)
class GPU:
    """Published peaks of one GPU.

    Attributes:
        name: Its name, as in reports.
        words: Words that are all in the name that CUDA reports.
        capability: Compute capability.
        half: Half precision with float32 sums on tensor cores, dense, in FLOP/s.
        single: Float32 without tensor cores, in FLOP/s.
        bandwidth: Bytes per second from memory.
        processors: Number of multiprocessors.
        clock: Boost clock in Hz.
    """

    name: str
    words: tuple[str, ...]
    capability: tuple[int, int]
    half: float
    single: float
    bandwidth: float
    processors: int
    clock: float

    @property
    def exponentials(self) -> float:
        """Exponentials per second."""
        return 16 * self.processors * self.clock


GPUS = (
    GPU("H200", ("H200",), (9, 0), 989e12, 67e12, 4.8e12, 132, 1.98e9),
    GPU("H100 PCIe", ("H100", "PCIe"), (9, 0), 756e12, 51e12, 2.0e12, 114, 1.755e9),
    GPU("H100", ("H100",), (9, 0), 989e12, 67e12, 3.35e12, 132, 1.98e9),
    GPU("A100 40 GB", ("A100", "40GB"), (8, 0), 312e12, 19.5e12, 1.555e12, 108, 1.41e9),
    GPU("A100", ("A100",), (8, 0), 312e12, 19.5e12, 2.039e12, 108, 1.41e9),
    GPU("RTX 4090", ("RTX 4090",), (8, 9), 165.2e12, 82.6e12, 1.008e12, 128, 2.52e9),
)
"""The most special names first."""

USUAL = GPUS[2]
"""The GPU that is assumed where none can be seen."""

_OTHER_MODELS = ("NVL", "MIG", "Laptop", "4090 D")
"""Words for models that share a name with one of `GPUS`, but not its peaks."""


def _attention(gpu: GPU, itemsize: int) -> Prices:
    """Prices of fused dense attention on a GPU."""
    half = itemsize == 2
    flops = HALF_SHARE * gpu.half if half else SINGLE_SHARE * gpu.single
    row = 2 * 64 * itemsize / gpu.bandwidth  # a query read and a result written, of 64 channels
    return Prices(2 * LAUNCH_SECONDS, 2 / flops, 1 / gpu.exponentials, 1 / gpu.bandwidth, row)


def _table(gpu: GPU, itemsize: int) -> dict[str, Prices]:
    """Prices of every kernel; all but `DENSE` are assumptions about programs like these."""
    dense = _attention(gpu, itemsize)
    fused = replace(dense, call=LAUNCH_SECONDS)
    listed = replace(
        fused,
        mac=fused.mac * (TRITON_WORTH if itemsize == 2 else SINGLE_WORTH),
        byte=1 / (CACHE_BYTES_PER_CLOCK * gpu.clock),
    )
    single = _attention(gpu, 4)
    return {
        DENSE: dense,
        MASKED: masked_prices(dense),
        # products of a few rows, and a choice among scores that lie in memory
        PLANNING: replace(fused, mac=3 * fused.mac, logit=SCORE_BYTES / gpu.bandwidth),
        # computes in float32
        "reference": replace(single, call=LAUNCH_SECONDS),
        # with a mask, torch runs slower kernels
        "sdpa": replace(fused, mac=2 * fused.mac, logit=2 * fused.logit),
        # a byte that is gathered is read, written and read again
        "gather": replace(fused, mac=1.5 * fused.mac, byte=3 * fused.byte),
        "varlen": replace(fused, call=3 * LAUNCH_SECONDS),
        # keys come from the cache
        "triton": listed,
        "flex": listed,
        "xformers": listed,
        # twice as slow, so that `auto` takes triton until they are measured
        "flash_attn_4": replace(listed, mac=2 * listed.mac),
        "natten": replace(listed, mac=2 * listed.mac),
    }


_TABLES = {(gpu.name, size): _table(gpu, size) for gpu in (*GPUS,) for size in (2, 4)}


class Known(NamedTuple):
    """Which prices a GPU gets.

    Attributes:
        gpu: The GPU whose peaks are used.
        guess: Why these may not be the peaks of the GPU at hand; empty if they are.
    """

    gpu: GPU
    guess: str

    @property
    def origin(self) -> str:
        """Where the prices come from, in words."""
        sheet = f"NVIDIA's data sheet of the {self.gpu.name}"
        return f"{sheet}, a guess: {self.guess}" if self.guess else sheet


_KNOWN: dict[torch.device, Known] = {}


def recognise(name: str, capability: tuple[int, int]) -> Known:
    """The entry of `GPUS` for a GPU, else that of the nearest compute capability.

    Args:
        name: The name that CUDA reports.
        capability: Compute capability.

    >>> recognise("NVIDIA H200", (9, 0)).gpu.name
    'H200'
    >>> recognise("NVIDIA L4", (8, 9)).origin
    "NVIDIA's data sheet of the RTX 4090, a guess: the NVIDIA L4 has compute capability 8.9, too"
    """
    named = next((gpu for gpu in GPUS if all(word in name for word in gpu.words)), None)
    if named is not None:
        other = next((word for word in _OTHER_MODELS if word in name), None)
        return Known(named, "" if other is None else f"this one is the {name}")
    # 12.x are desktop GPUs, the successors of 8.9; H200 and H100 share theirs
    looked_up = (8, 9) if capability[0] == 12 else capability
    nearest = min(
        (USUAL, GPUS[4], GPUS[5]),
        key=lambda gpu: abs(_number(gpu.capability) - _number(looked_up)),
    )
    too = ", too" if nearest.capability == capability else ""
    major, minor = capability
    return Known(nearest, f"the {name} has compute capability {major}.{minor}{too}")


def _number(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]


def known(device: torch.device) -> Known:
    """Which prices a device gets; asks CUDA once for each device."""
    found = _KNOWN.get(device)
    if found is None:
        seen = tuning_cache.gpu(device)
        found = Known(USUAL, "no GPU can be seen here") if seen is None else recognise(*seen)
        _KNOWN[device] = found
    return found


def shipped(device: torch.device, dtype: torch.dtype) -> dict[str, Prices]:
    """The prices of a GPU, in the dtype of its operands."""
    found = _KNOWN.get(device)
    if found is None and not torch.compiler.is_compiling():
        found = known(device)
    gpu = USUAL if found is None else found.gpu
    return _TABLES[gpu.name, 2 if dtype.itemsize == 2 else 4]
