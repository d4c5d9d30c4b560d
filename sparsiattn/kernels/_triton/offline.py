"""Compiles launches for GPUs that are not there. Imports triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsiattn.kernels._triton.launch import Launch

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def compiled(launch: Launch, capability: int) -> Any:
    """A launch compiled to machine code, specialised as a launch on the device would be.

    Args:
        launch: The launch; its tensors may be meta tensors.
        capability: Compute capability of the GPU, 90 for 9.0.

    Returns:
        What `triton.compile` returns.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints = {}
    for at, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            hints[(at,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, hints),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
