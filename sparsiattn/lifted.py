"""Modules whose hand-written attention is lifted while a patch listens."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from sparsiattn.errors import ModelChanged
from sparsiattn.interception import THREAD
from sparsiattn.lifting import Lift, Scores, Tally

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


class Trial(Lift):
    """The dry run's: puts scores off in every module, and notes what becomes of each softmax."""

    def __init__(self) -> None:
        super().__init__(Tally())
        self.names: dict[int, str] = {}
        self.clear()

    def clear(self) -> None:
        self.attending = False
        self.softmaxes: dict[str, str] = {}
        self._computed: dict[str, str] = {}

    def attend(self, *operands: Any, **options: Any) -> Tensor:
        self.attending = True
        try:
            return super().attend(*operands, **options)
        finally:
            self.attending = False

    def home(self) -> int:
        return 0 if THREAD.top is None else THREAD.top[1]

    def refuse(self, scores: Scores, because: str) -> None:
        name = self.names.get(scores.home, "")
        self._computed.setdefault(name, because)
        if scores.softmaxed:
            self.softmaxes[name] = self._reason(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func.__name__.strip("_") == "softmax" and not isinstance(result, Scores):
            name = self.names.get(self.home(), "")
            self.softmaxes.setdefault(name, self._reason(name))
        return result

    def _reason(self, name: str) -> str:
        because = self._computed.get(name)
        if because is None:
            return "its softmax is not attention between tokens"
        return (
            f"hand-written attention whose scores go through {because.strip('_')}(), which is no "
            "part of scaled dot product attention (talking heads, gates, attention over channels)"
        )


def lift(module: nn.Module) -> None:
    kind: Any = type(module)
    if HOST not in vars(kind):
        module.__class__ = lifted_class(kind)


def drop(module: nn.Module) -> None:
    """Give a lifted module its own class back."""
    host = vars(type(module)).get(HOST)
    if host is not None:
        setattr(module, "__class__", host)  # noqa: B010
