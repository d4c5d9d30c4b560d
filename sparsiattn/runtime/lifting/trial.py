"""The mode of the dry run: finds attention that can be lifted, and explains every other softmax."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsiattn.runtime.lifting.mode import Lift, Tally
from sparsiattn.runtime.lifting.scores import Scores
from sparsiattn.runtime.lifting.sums import SUMS, can_put_off
from sparsiattn.runtime.thread_state import SITE_CALLS

SUM_VIEWS = (
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("expand", "expand_as", "to", "type_as", "float", "contiguous"),
)
"""Operations that hosts apply to a bias sum before attention uses it."""


class Trial(Lift):
    """Mode of the dry run: defers scores in every module, and notes the use of each softmax."""

    puts_off_sums = False  # the origin of a host's tokens is traced through plain tensors

    def __init__(self) -> None:
        super().__init__(Tally())
        self.names: dict[int, str] = {}
        self.clear()

    def clear(self) -> None:
        self.attending = False
        self.softmaxes: dict[str, str] = {}
        self._computed: dict[str, str] = {}
        self._sums: dict[int, Tensor] = {}

    def is_sum(self, mask: Tensor | None) -> bool:
        """Whether a mask is a sum that a patched module can leave uncomputed, or a view of one."""
        return id(mask) in self._sums

    def attend(self, *operands: Any, **options: Any) -> Tensor:
        self.attending = True
        try:
            return super().attend(*operands, **options)
        finally:
            self.attending = False

    def home(self) -> int:
        return 0 if SITE_CALLS.top is None else SITE_CALLS.top[1]

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
        name = func.__name__.strip("_")
        viewed = name in SUM_VIEWS and self.is_sum(args[0])
        if viewed or (name in SUMS and can_put_off(args, kwargs)):
            self._sums[id(result)] = result  # kept alive, so that its id stays unique
        return result

    def _reason(self, name: str) -> str:
        because = self._computed.get(name)
        if because is None:
            return "its softmax is not attention between tokens"
        return (
            f"hand-written attention whose scores go through {because.strip('_')}(), which is not "
            "part of scaled dot product attention (talking heads, gates, attention over channels)"
        )
