"""Modules whose hand-written attention is lifted while a patch listens."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.class_swap import Swapped, swap_class, swap_class_back
from sparsiattn.runtime.lifting.mode import Lift, Tally
from sparsiattn.runtime.lifting.scores import Scores
from sparsiattn.runtime.thread_state import SITE_CALLS


class Lifted(Swapped):
    """Mixin of an attention module's class that lifts its attention while a patch listens."""

    @staticmethod
    def members(host: Any) -> dict[str, Any]:
        return {"forward": _lifted_forward(host)}


def _lifted_forward(host: Any) -> Any:
    @wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        top = SITE_CALLS.top
        if top is None or top[0] is None:
            return host.forward(self, *args, **kwargs)
        tally = Tally()
        with Lift(tally):
            output = without_scores(host.forward(self, *args, **kwargs))
        if not tally.attended:
            raise ModelChanged(
                f"{host.__name__} took another way than in the dry run when it was patched, so its "
                "attention was not reached; unpatch() and patch again, or leave it out with sites="
            )
        return output

    return forward


def without_scores(output: Any, home: int = 0) -> Any:
    """A module's output without the attention weights that it may return beside its result.

    Sparse attention has none. Transformers' own fused attention returns None in their place, too.

    Args:
        output: What the module returned.
        home: Scores made elsewhere go on to where they belong.
    """
    if isinstance(output, Scores) and output.home == home:
        return output.tensor("return")
    if type(output) in (tuple, list):
        return type(output)([_unless_weights(x, home) for x in output])
    return output


def _unless_weights(value: Any, home: int) -> Any:
    if not isinstance(value, Scores) or value.home != home:
        return value
    return None if value.softmaxed else value.tensor("return")


def lift(module: nn.Module) -> None:
    """Lift the hand-written attention of a module while a patch listens."""
    swap_class(module, Lifted)


def drop(module: nn.Module) -> None:
    """Give a lifted module its own class back."""
    swap_class_back(module, Lifted)
