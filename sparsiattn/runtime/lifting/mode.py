"""The mode under which products of queries and keys are put off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsiattn.runtime.lifting import operations as operations
from sparsiattn.runtime.lifting.equations import equation, is_product
from sparsiattn.runtime.lifting.scores import Scores


class Tally:
    """How many products became a call of scaled dot product attention."""

    def __init__(self) -> None:
        self.attended = 0


class Lift(TorchFunctionMode):
    """While active, products of two computed operands are put off.

    Attributes:
        tally: Counts the products that became attention.
        idle: Whether nothing is put off for the moment.
    """

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.idle = False
        self.tally = tally  # Dynamo loses sight of a mode's own attributes once it is left

    def attend(self, *operands: Any, **options: Any) -> Tensor:
        """Scaled dot product attention; arguments as torch takes them."""
        self.tally.attended += 1
        return F.scaled_dot_product_attention(*operands, **options)

    def home(self) -> int:
        """Tells where scores are made: they must meet their values in the same module."""
        return 0

    def refuse(self, scores: Scores, because: str) -> None:
        """Told when scores have to be computed, by the name of the operation that needs them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        if name in PRODUCTS and not kwargs and not self.idle:
            operands = factors(name, args)
            if operands is not None:
                return Scores(self, *operands)
        return func(*args, **(kwargs or {}))


PRODUCTS = ("matmul", "bmm", "einsum")


def factors(name: str, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """The operands of a product that can be put off.

    They are two computed tensors of three dimensions or more; parameters are weights, not keys.

    Args:
        name: One of `PRODUCTS`.
        args: Its positional arguments.

    Returns:
        ``[..., Nq, D]`` and ``[..., D, Nk]``; None for anything else.
    """
    if name == "einsum":
        parsed = equation(args)
        if parsed is None or not is_product(parsed[0]):
            return None
        _, left, right = parsed
    else:
        left, right = args
    for x in (left, right):
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or x.dim() < 3:
            return None
    if left.dim() != right.dim():
        return None
    return left, right.transpose(-2, -1) if name == "einsum" else right
