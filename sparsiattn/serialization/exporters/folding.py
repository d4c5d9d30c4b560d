"""Tables that depend on no input, computed once when a program is made instead of at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_MOST_ELEMENTS = 1 << 25
"""Of one table that is kept: 128 MiB of float32."""
_RANDOM = torch.Tag.nondeterministic_seeded


def fold(module: GraphModule) -> int:
    """Put what a functional program computes from constants alone in as buffers; gives how many.

    Weights stay weights. Besides time this saves agreement: another runtime breaks ties between
    equal scores (of patches equally far away, say) in its own way, and would choose other keys.
    """
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        found = _value(module, node, values)
        if found is not None:
            values[node] = found
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


def _value(module: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """What a node gives whatever the input, None where that is not known."""
    if node.op == "get_attr":
        found = _attribute(module, str(node.target))
        return None if isinstance(found, torch.nn.Parameter) else found
    if node.op != "call_function" or any(one not in values for one in node.all_input_nodes):
        return None
    if not _is_pure(node.target):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda one: values[one])
    with torch.no_grad():
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    huge = isinstance(found, Tensor) and found.numel() > _MOST_ELEMENTS
    return None if huge else found


def _is_pure(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and _RANDOM not in target.tags
    return getattr(target, "__name__", "") == "getitem"


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _replace(module: GraphModule, node: Node, value: Tensor, name: str) -> None:
    module.register_buffer(name, value.detach().clone())
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta.update(node.meta)
    node.replace_all_uses_with(constant)
