"""What torch's compiler sees of the Triton kernels, on a GPU that is not there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import fake_gpu

pytestmark = fake_gpu.NEEDED
HALF = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=fake_gpu.CUDA)


def attention_operands(batch: int = 2) -> tuple[Any, ...]:
    """Those of a call with 64-query tiles, key blocks, a summary and a CLS token."""
    q, k, v = empty(batch, 257, 3, 2, 64).permute(2, 0, 3, 1, 4)
    ids = torch.int64
    pooled = empty(batch, 2, 4, 64), empty(batch, 2, 4, 64)
    order, chosen = empty(4, 64, dtype=ids), empty(batch, 2, 4, 5, dtype=ids)
    rows = empty(batch, 2, 4, 4, dtype=torch.float32)
    table = empty(16, 16, dtype=ids)
    return (q, k, v, *pooled, None, rows, order, None, chosen, None, table, 1, 1, 80, 0.125, None)


def attend(*tensors: Any) -> Tensor:
    from sparsiattn.kernels._triton.ops import key_list_attention

    out: Tensor = key_list_attention(*tensors)[0]
    return out


@dataclass
class Graph:
    """What torch's compiler lowers of one pass.

    Attributes:
        kernels: Names of the Triton kernels that it launches, in order.
        results: For each launch, the operands that it writes to.
        operators: Names of this library's operators.
        returned: Number of tensors that it returns, or writes back to its operands.
    """

    kernels: list[str]
    results: list[set[str]]
    operators: set[str]
    returned: int

    @classmethod
    def of(cls, module: Any) -> Graph:
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        functional = torch.ops.higher_order.triton_kernel_wrapper_functional
        launches = [node for node in nodes if node.target is functional]
        return cls(
            [_kernel_name(node) for node in launches],
            [set(node.kwargs["tensors_to_clone"]) for node in launches],
            {str(node.target) for node in nodes if "sparsiattn" in str(node.target)},
            len(module.graph.output_node().args[0]),
        )


def _kernel_name(node: Any) -> str:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return str(getattr(kernel, "fn", kernel).__name__)


@contextmanager
def compiler(lower: Callable[[Any, Any], Any], **options: Any) -> Iterator[Any]:
    """Torch's compiler for a GPU that is not there.

    Args:
        lower: Called with each graph that would be lowered, and its inputs; returns the graph.
        **options: Of `torch.compile`.
    """
    backend = fake_gpu.backend(lower)
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_gpu._pretended_gpu((9, 0)):
        yield partial(torch.compile, backend=backend, fullgraph=True, **options)
        torch.compiler.reset()


def keep(found: list[Graph], module: Any, examples: Any) -> Any:
    found.append(Graph.of(module))
    return module


def graphs_of_attention(*, dynamic: bool = False) -> list[Graph]:
    """The graphs of an attention call. (Torch traces backward passes on a real GPU only.)"""
    found: list[Graph] = []
    with compiler(partial(keep, found), dynamic=dynamic) as compiled, torch.no_grad():
        compiled(attend)(*attention_operands())
    return found


def test_a_compiled_program_launches_the_kernel_itself() -> None:
    (graph,) = graphs_of_attention()
    assert graph.operators == set()
    assert graph.kernels == ["forward"]
    assert graph.results == [{"out", "lse"}]  # so nothing else is copied before


@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_so_does_its_backward_pass(repeatable: bool, masked: bool) -> None:
    from sparsiattn.kernels._triton.ops import key_list_attention_backward

    def backward(*given: Any) -> Any:
        return key_list_attention_backward(*given, masked, True, repeatable)

    found: list[Graph] = []
    with compiler(partial(keep, found), dynamic=False) as compiled, torch.no_grad():
        operands = list(attention_operands())
        if masked:
            operands[5] = empty(2, 1, 257, 257)
        grad, out = (empty(2, 257, 2, 64).transpose(1, 2) for _ in range(2))
        compiled(backward)(grad, out, empty(2, 2, 257, dtype=torch.float32), *operands)
    (graph,) = found
    assert graph.operators == set()
    assert graph.kernels == ["backward", *["key_gradients"] * 2 * repeatable]
    assert {"to_k", "to_v"} <= set().union(*graph.results)
    assert graph.returned == 7


def test_it_stays_an_operator_where_shapes_are_symbolic() -> None:
    (graph,) = graphs_of_attention(dynamic=True)
    assert graph.kernels == []
    assert graph.operators == {"sparsiattn.key_list_attention.default"}


def test_an_exported_program_keeps_the_operator() -> None:
    class Attend(torch.nn.Module):
        def forward(self, *operands: Any) -> Tensor:
            return attend(*operands, 1, 1, 80, 0.125, None)

    with FakeTensorMode(allow_non_fake_inputs=True), fake_gpu._pretended_gpu((9, 0)):
        program = torch.export.export(Attend(), attention_operands()[:-5])
        graph = Graph.of(program.graph_module)
    assert graph.operators == {"sparsiattn.key_list_attention.default"}


def test_the_compiler_writes_the_launch_into_its_code() -> None:
    from torch._guards import detect_fake_mode
    from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import UserDefinedTritonKernel
    from torch._inductor.virtualized import V

    kernels: list[Any] = []

    def lower(module: Any, examples: Any) -> Any:
        graph = copy.deepcopy(module)
        decompose_triton_kernel_wrapper_functional(graph.graph)
        lowering = GraphLowering(graph, example_inputs=examples)
        with V.set_graph_handler(lowering), V.set_fake_mode(detect_fake_mode(examples)):
            lowering.run(*examples)
        kernels.extend(op for op in lowering.operations if isinstance(op, UserDefinedTritonKernel))
        return module

    with compiler(lower, dynamic=False) as compiled, torch.no_grad():
        compiled(attend)(*attention_operands())
    assert len(kernels) == 1
    assert len({x.get_name() for x in kernels[0].mutable_args}) == 2


def test_planning_too() -> None:
    from sparsiattn.kernels._triton.plan_ops import pool_cells, voted_keys

    def plan(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Any:
        order, held, cells, members, sizes, total = tables
        pooled = pool_cells(k, v, cells, members, sizes, None)
        return *pooled, *voted_keys(q, k, order, held, 4, 26, 1, 0.125, cells, total)

    found: list[Graph] = []
    with compiler(partial(keep, found), dynamic=False) as compiled, torch.no_grad():
        q, k, v = empty(2, 257, 3, 2, 64).permute(2, 0, 3, 1, 4)
        ids = torch.int64
        tables = (
            empty(16, 16, dtype=ids), empty(16, dtype=ids), empty(257, dtype=ids),
            empty(4, 64, dtype=ids), empty(4, dtype=ids), empty(5, dtype=torch.float32),
        )  # fmt: skip
        compiled(plan)(q, k, v, *tables)
    (graph,) = found
    assert graph.kernels == ["pool", "vote", "rank"]
    assert graph.results == [{"mean_k", "mean_v"}, {"votes"}, {"index", "bias"}]
    assert graph.operators == set()
