"""A GPU that is not there: torch's compiler lowers programs for it, up to the code of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils._triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.utils import _triton

CUDA = torch.device("cuda", 0)

NEEDED = pytest.mark.skipif(
    torch.cuda.is_available() or not _triton.has_triton_package(),
    reason="needs triton, and no GPU, whose properties torch would have cached",
)
"""Mark of a test that calls `lowered_kernels`."""


@contextmanager
def _pretended_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """What torch's compiler asks of a GPU, answered as by an H100."""
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    major, minor = capability
    cc = 10 * major + minor
    common = {"multi_processor_count": 132, "major": major, "warp_size": 32}
    hints = DeviceProperties(type="cuda", index=0, cc=cc, **common)
    properties = SimpleNamespace(name="H100", minor=minor, **common)
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", cc, 32))
    with ExitStack() as stack:
        for owner, name, answer in (
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (DeviceProperties, "create", lambda *_: hints),
            (triton.runtime.driver, "_active", driver),
        ):
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


def backend(lower: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A backend of `torch.compile` for programs whose arguments are fake tensors.

    Args:
        lower: Called with each graph that would be lowered, and its inputs; returns the graph.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext
    from torch._inductor.decomposition import select_decomp_table

    traced = aot_autograd(fw_compiler=lower, decompositions=select_decomp_table())

    def run(graph: Any, examples: Any) -> Any:
        mode = TracingContext.get().fake_mode
        assert mode is not None
        # older torch refuses fake tensors of another mode than that of its trace
        return traced(graph, [mode.from_tensor(x) if is_fake(x) else x for x in examples])

    return run


def lowered_kernels(
    program: Callable[..., Any],
    operands: Sequence[Tensor | None],
    capability: tuple[int, int] = (9, 0),
) -> list[str]:
    """Names of the kernel templates that torch's compiler chooses for a forward pass on a GPU.

    Args:
        program: The function to compile, without gradients.
        operands: Its arguments on the CPU; only their shapes and dtypes matter.
        capability: Compute capability of the GPU.

    Raises:
        torch._dynamo.exc.BackendCompilerFailed: The program cannot be lowered.
    """
    names: list[str] = []

    def lower(graph: Any, examples: Any) -> Any:
        names.extend(_templates(graph, examples))
        return graph

    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), _pretended_gpu(capability), torch.no_grad():
        there = [None if x is None else _on_gpu(x) for x in operands]
        torch.compile(program, backend=backend(lower), fullgraph=True, dynamic=False)(*there)
    torch.compiler.reset()
    return names


def _on_gpu(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


def _templates(graph: Any, examples: Any) -> list[str]:
    """Lower one graph; the names of its template kernels."""
    from torch._guards import detect_fake_mode
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import TemplateBuffer
    from torch._inductor.virtualized import V

    lowering = GraphLowering(graph, example_inputs=examples)
    with V.set_graph_handler(lowering), V.set_fake_mode(detect_fake_mode(examples)):
        lowering.run(*examples)
    return [op.name for op in lowering.operations if isinstance(op, TemplateBuffer)]


@contextmanager
def planned_for_gpu(name: str, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Patches are planned as if the model were on this GPU; it stays on the CPU and cannot run.

    Args:
        name: The name that CUDA would report.
        capability: Compute capability.
    """
    from sparsiattn.kernels import cost, gpu_prices, triton_plan, tuning_cache
    from sparsiattn.runtime import placement

    with ExitStack() as stack:
        for owner, attribute, answer in (
            (torch.cuda, "is_available", lambda: True),
            (triton_plan, "is_planned_on", lambda device: device.type == "cuda"),
            (tuning_cache, "gpu", lambda device: (name, capability)),
            (placement, "device_of", lambda weight: CUDA),
            (gpu_prices, "_KNOWN", {}),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, answer))
        cost.reload()
        yield
    cost.reload()
