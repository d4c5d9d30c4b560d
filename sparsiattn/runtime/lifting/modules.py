"""Modules whose hand-written attention is lifted while a patch listens."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch import nn

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.lifting.mode import Lift, Tally
from sparsiattn.runtime.lifting.scores import Scores
from sparsiattn.runtime.sdpa_intercept import THREAD

HOST = "_sparsiattn_lifted"


class Lifted:
    """Mixin of the swapped classes: pickles and copies as (its host's class, its state)."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        host = vars(type(self)).get(HOST)
        return reduced if host is None else (_empty, (host,), *reduced[2:])


def _empty(host: type) -> Any:
    kind = lifted_class(host)
    return kind.__new__(kind)


@cache
def lifted_class(host: Any) -> Any:
    """A subclass of an attention module's class, of the same name, that lifts its attention."""

    @wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        top = THREAD.top
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

    fields = {"forward": forward, "__module__": host.__module__, HOST: host}
    return type(host.__name__, (Lifted, host), fields)


def without_scores(output: Any, home: int = 0) -> Any:
    """A module's output, without the attention weights it may return beside its result: sparse
    attention has none. Transformers' own fused attention returns None in their place, too. Scores
    of a home other than this one go on to where they belong."""
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
    kind: Any = type(module)
    if HOST not in vars(kind):
        module.__class__ = lifted_class(kind)


def drop(module: nn.Module) -> None:
    """Give a lifted module its own class back."""
    host = vars(type(module)).get(HOST)
    if host is not None:
        setattr(module, "__class__", host)  # noqa: B010
