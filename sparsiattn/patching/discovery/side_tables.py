"""Whether a block adds the head dimension to position tables among its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsiattn.patching.discovery.values import Step

_PARTS = frozenset({"split", "split_with_sizes", "slice", "chunk", "alias", "detach", "_to_copy"})
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})


def adds_heads(steps: Sequence[Step]) -> bool:
    """Whether a block takes tables ``[B, n, D]`` and turns them into ``[B, 1, n, D]`` itself.

    Other tables have a head dimension already, ``[H, n, D]``, so a batch dimension goes before it.

    Args:
        steps: The steps in the block, its entry first.
    """
    tables = set(steps[0].values[1:])
    for step in steps[1:]:
        if step.call is None or not tables.intersection(step.values[:1]):
            continue
        if step.call[0]._schema.name.removeprefix("aten::") in _PARTS:
            tables.update(step.results)
        elif _adds_axis(step):
            return True
    return False


def _adds_axis(step: Step) -> bool:
    """Whether an operator adds a dimension after the first one of a 3-D table."""
    assert step.call is not None
    func, args, _, out = step.call
    name, table = func._schema.name.removeprefix("aten::"), args[0]
    if not isinstance(table, Tensor) or table.dim() != 3:
        return False
    if name == "unsqueeze":
        return args[1] % 4 in (1, 2)
    return name in _VIEWS and out.dim() == 4 and out.shape[0] == table.shape[0]
