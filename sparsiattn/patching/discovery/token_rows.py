"""Checks that operations keep several sequences of one image (video frames, tiles) separate.

Different tokens remain in each of them, so they must not be combined. They are along the first
dimension of a block's output. An operation that keeps them there processes each separately; any
other counts as reading positions.
"""

from __future__ import annotations

from torch import Tensor

from sparsiattn.patching.discovery.token_axis import Operation, Outcome, ReadsPositions

_REGULAR = ("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze")
"""Operators that add dimensions and leave the order of elements."""


def check_rows(operation: Operation, outcome: Outcome) -> None:
    """Check that an operation keeps several sequences of an image separate.

    Args:
        operation: The operation.
        outcome: The token axis after the operation.

    Raises:
        ReadsPositions: It may combine them.
    """
    for x, axis in operation.axes():
        if axis.rows > 1 and not _keeps_rows(operation, x, outcome):
            raise ReadsPositions(f"{operation.name} across several sequences of an image")


def _keeps_rows(operation: Operation, x: Tensor, outcome: Outcome) -> bool:
    outcomes = outcome if isinstance(outcome, list) else [outcome]
    results = operation.out if isinstance(operation.out, (list, tuple)) else [operation.out]
    carried = [(out, axis) for out, axis in zip(results, outcomes, strict=False) if axis]
    if not carried:  # every sequence was reduced separately
        return True
    if operation.name not in _REGULAR and any(out.dim() > x.dim() for out, _ in carried):
        return False
    if _mixes_first(operation, x):
        return False
    return all(
        axis.outer == axis.rows if axis.dim == 0 else out.shape[0] == axis.rows
        for out, axis in carried
    )


def _mixes_first(operation: Operation, x: Tensor) -> bool:
    """Whether an operation moves the first dimension of a tensor, or sums over it."""
    args, rank = operation.args, max(1, x.dim())
    if operation.name in ("mm", "addmm"):
        return x is args["mat2"]
    if operation.name == "permute":
        return bool(args["dims"][0] % rank != 0)
    if operation.name in ("transpose", "t"):
        return 0 in [args.get(name, i) % rank for i, name in enumerate(("dim0", "dim1"))]
    return "softmax" in operation.name and args["dim"] % rank == 0
