"""Constant folding: compute tables that depend on no input when a program is created."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_MOST_ELEMENTS = 1 << 25
"""Largest number of elements of a stored table: 128 MiB of float32."""
_RANDOM = torch.Tag.nondeterministic_seeded


_CHECKS = ("aten::_assert_tensor_metadata",)


def is_functional(graph: Graph) -> bool:
    """Whether no operator of a program writes to a tensor."""
    targets = (node.target for node in graph.nodes)
    return not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


def fold(module: GraphModule) -> int:
    """Replace values that a functional program computes only from constants by buffers.

    Values that are computed more than once, such as the same table at every site, are shared.
    Weights stay weights. Folding saves time and keeps the results equal: another runtime may break
    ties between equal scores (of patches at the same distance, for example) in another way, and
    would select other keys.

    Args:
        module: The program, changed in place.

    Returns:
        Number of new buffers.
    """
    _share(module)
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        value = _value(module, node, values)
        if value is not None:
            values[node] = value
    used = [
        node
        for node, value in values.items()
        if node.op == "call_function"
        and isinstance(value, Tensor)
        and any(user not in values for user in node.users)
    ]
    for count, node in enumerate(used):
        _replace(module, node, values[node], f"_table_{count}")
    module.graph.eliminate_dead_code()
    module.recompile()
    return len(used)


def _share(module: GraphModule) -> None:
    """Merge equal calls of pure functions, and equal constants."""
    known: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _is_check(node.target):
            module.graph.erase_node(node)
            continue
        first = known.setdefault(_key(module, node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def _key(module: GraphModule, node: Node) -> Any:
    """A key that is equal for nodes with the same value."""
    if node.op == "get_attr":
        return id(operator.attrgetter(str(node.target))(module))
    if node.op == "call_function" and _is_pure(node.target):
        return f"{node.target} {node.args} {node.kwargs}"  # nodes print as their unique names
    return node


def _is_check(target: Any) -> bool:
    """Whether a call only checks properties that were known at tracing."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in _CHECKS


def _value(module: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """The constant value of a node; None if it depends on the input or is too large."""
    if node.op == "get_attr":
        constant = operator.attrgetter(str(node.target))(module)
        return None if isinstance(constant, torch.nn.Parameter) else constant
    if node.op != "call_function" or not _is_pure(node.target):
        return None
    if not values.keys() >= set(node.all_input_nodes):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    huge = isinstance(value, Tensor) and value.numel() > _MOST_ELEMENTS
    return None if huge else value


def _is_pure(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and _RANDOM not in target.tags
    return getattr(target, "__name__", "") == "getitem"


def _replace(module: GraphModule, node: Node, value: Tensor, name: str) -> None:
    module.register_buffer(name, value.detach().clone())
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta.update(node.meta)
    node.replace_all_uses_with(constant)
