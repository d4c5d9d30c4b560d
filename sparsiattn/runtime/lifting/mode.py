"""The torch function mode that defers products of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.lifting import operations as operations
from sparsiattn.runtime.lifting.equations import equation, is_product
from sparsiattn.runtime.lifting.scores import Scores
from sparsiattn.runtime.lifting.sums import SUMS, put_off_sum
from sparsiattn.runtime.thread_state import SITE_CALLS


class Tally:
    """Counts for one call of a lifted module.

    Attributes:
        attended: Number of products that became a call of scaled dot product attention.
        ended: Whether the call is over.
    """

    def __init__(self) -> None:
        self.attended = 0
        self.ended = False


class Lift(TorchFunctionMode):
    """While active, products of two computed operands are deferred.

    Torch's original scaled dot product attention, which some hosts imported by name before it was
    wrapped, is sent through the wrapper too.

    Attributes:
        tally: Counts the products that became attention.
        idle: Whether deferring is paused.
        puts_off_sums: Whether bias sums are deferred too; see `sparsiattn.runtime.lifting.sums`.
    """

    puts_off_sums = True

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.idle = False
        self.tally = tally  # Dynamo loses sight of a mode's own attributes once it is left

    def attend(self, *operands: Any, **options: Any) -> Tensor:
        """Scaled dot product attention; arguments as torch takes them."""
        self.tally.attended += 1
        return F.scaled_dot_product_attention(*operands, **options)

    def _passes_by(self, func: Any, name: str) -> bool:
        """Whether this is a site's call of attention that bypasses the wrapper.

        A call that a kernel makes itself goes to torch directly.
        """
        if name.partition(".")[0] != ATTENTION or func is F.scaled_dot_product_attention:
            return False
        top = SITE_CALLS.top
        return top is not None and top[0] is not None

    def home(self) -> int:
        """Key of the module in which scores are made; they must meet their values there."""
        return 0

    def refuse(self, scores: Scores, because: str) -> None:
        """Called before scores are computed.

        Args:
            scores: The scores.
            because: Name of the operation that needs their values.

        Raises:
            ModelChanged: The module call that made them has ended.
        """
        if self.tally.ended:
            raise ModelChanged(
                "attention scores or weights of a patched module were stored and are read after it "
                "returned, but a patched module does not compute them: read the weights in a "
                "forward hook of its dropout or softmax, while the module runs"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        if self._passes_by(func, name):
            return self.attend(*args, **(kwargs or {}))
        if name in PRODUCTS and not kwargs and not self.idle:
            operands = factors(name, args)
            if operands is not None:
                return Scores(self, *operands)
        if name in SUMS and self.puts_off_sums and not self.idle:
            bias = put_off_sum(args, kwargs)
            if bias is not None:
                return bias
        return func(*args, **(kwargs or {}))


ATTENTION = F.scaled_dot_product_attention.__name__
PRODUCTS = ("matmul", "bmm", "einsum")


def factors(name: str, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """The operands of a product that can be deferred.

    Both must be computed tensors with at least three dimensions. Parameters are weights, not keys.

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
