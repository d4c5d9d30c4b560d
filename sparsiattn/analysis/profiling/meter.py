"""What one forward pass spends its multiply-accumulates on, counted while it runs.

Every operation is counted by `torch.utils.flop_counter` and put down to the innermost open section:
the hooks of `profiling` open those of blocks and attention modules, and sites open those of their
planner and of attention itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import HostCall
from sparsiattn.attention.pattern import ComputedPattern, Dense, Lengths, Pattern
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Choice
from sparsiattn.patching.flop_counter import flop_counter
from sparsiattn.runtime.thread_state import MODEL_CALL
from sparsiattn.strategies.base import Planner

if TYPE_CHECKING:
    from sparsiattn.runtime.block_runtime import BlockRuntime
    from sparsiattn.runtime.site_runtime import SiteRuntime

MHSA, PREDICTOR, TOKENS = "mhsa", "predictor", "tokens"
ATTENTION, MLP, REST = "attention", "mlp", "rest"
"""Parts: QK^T and AV; choosing keys; choosing tokens; the rest of attention modules; the rest of
the blocks around them; the rest of the model."""

Section = tuple[str, str]
"""A part, and the site, module or block by whose name it goes."""
T = TypeVar("T")


@dataclass(frozen=True)
class Attended:
    """One call of attention, its figures those of the whole batch.

    lists: images, windows and heads, each with its own ``queries`` and ``keys`` of ``dim``, which
    with their values are ``width`` wide (in the mean over pairs). pairs: (query, key) pairs of each
    of these that the pattern keeps, of ``all_pairs``; summary keys and their pooling count in
    ``macs`` alone. computed: MACs that ran, None if nothing could tell. choice: of the kernel, with
    planning paid; None for the host's own attention.
    """

    site: str
    lists: int
    queries: int
    keys: int
    dim: int
    width: float
    pairs: float
    all_pairs: float
    macs: float
    computed: int | None
    choice: Choice | None = None


class MacCounter:
    """The sections of one forward pass in one thread. names: by a patch's key and its own name of a
    site, the path in the model that runs."""

    def __init__(self, names: dict[tuple[int, str], str]) -> None:
        self.names = names
        self.spent: defaultdict[Section, int] = defaultdict(int)
        self.attended: list[Attended] = []
        self._counter = flop_counter()
        self._open: list[Section] = [(REST, "")]
        self._seen = 0
        self._planned: dict[str, cost.Planning] = {}

    @contextmanager
    def counting(self) -> Iterator[MacCounter]:
        """Count what this thread does inside the block."""
        before, MODEL_CALL.meter = MODEL_CALL.meter, self
        try:
            with self._counter:
                yield self
                self._settle()
        finally:
            MODEL_CALL.meter = before

    def enter(self, section: Section) -> None:
        self._settle()
        self._open.append(section)

    def leave(self, section: Section) -> None:
        """Close a section; that it never opened (an earlier hook raised) is no error."""
        self._settle()
        if self._open[-1] == section:
            self._open.pop()

    @contextmanager
    def section(self, part: str, name: str) -> Iterator[None]:
        self.enter((part, name))
        try:
            yield
        finally:
            self.leave((part, name))

    def _settle(self) -> None:
        """Put what was counted since the last call down to the innermost section."""
        total = int(self._counter.get_total_flops()) // 2
        self.spent[self._open[-1]] += total - self._seen
        self._seen = total

    def _spend(self, section: Section, call: Callable[[], T]) -> tuple[T, int]:
        """What a call returns, and the MACs that the counter saw."""
        before = self.spent[section]
        with self.section(*section):
            out = call()
        return out, self.spent[section] - before

    def name(self, runtime: SiteRuntime | BlockRuntime) -> str:
        return self.names[runtime.owner.key, runtime.site.name]

    def choosing(self, block: BlockRuntime) -> AbstractContextManager[None]:
        """The section of a block that chooses tokens."""
        return self.section(TOKENS, self.name(block))

    def plan(self, runtime: SiteRuntime, planner: Planner, inputs: AttentionInputs) -> Pattern:
        """The finished pattern of one call."""

        wishes: list[Pattern] = []

        def asked(given: AttentionInputs) -> Pattern:
            wishes.append(planner(given))
            return wishes[-1]

        name = self.name(runtime)
        pattern, macs = self._spend((PREDICTOR, name), lambda: runtime.plan(asked, inputs))
        if wishes:
            self._planned[name] = cost.planning_of(wishes[0], macs, inputs)
        return pattern

    def compute(
        self, runtime: SiteRuntime, choice: Choice, inputs: AttentionInputs, pattern: Pattern
    ) -> Tensor:
        """What the chosen kernel returns."""
        name, kernel = self.name(runtime), choice.kernel
        hidden = kernel.uncounted_macs(inputs, pattern)
        if hidden is None:
            out, computed = self._spend((MHSA, name), lambda: kernel(inputs, pattern))
            if not computed:  # an operation that torch's counter does not know
                work = kernel.work(inputs, pattern)
                hidden = None if work is None else round(work.macs)
        else:
            with _disable_current_modes():
                out = kernel(inputs, pattern)
        if hidden is not None:
            computed = hidden
            self.spent[MHSA, name] += hidden
        planned = self._planned.get(name)
        if planned is not None:
            choice = choice.after(planned)
        self._note(name, (inputs.q, inputs.k, inputs.v), pattern, computed or None, choice)
        return out

    def dense(self, runtime: SiteRuntime, call: HostCall) -> Tensor:
        """What the host's own attention at a site returns."""
        q, k, v = call.q, call.k, call.v
        name = self.name(runtime)
        out, computed = self._spend((MHSA, name), call.dense)
        self._note(name, (q, k, v), Dense(q.shape[-2], k.shape[-2]), computed, None)
        return out

    def _note(
        self, name: str, operands: tuple[Tensor, Tensor, Tensor], pattern: Pattern,
        computed: int | None, choice: Choice | None,
    ) -> None:  # fmt: skip
        from sparsiattn.patching.report import summary_pairs

        q, k, v = operands
        lists, queries, keys = q.shape[:-2].numel(), q.shape[-2], k.shape[-2]
        dim, width = q.shape[-1], float(q.shape[-1] + v.shape[-1])
        pairs = (pattern.pairs() or 0.0) - summary_pairs(pattern)
        every = pairs if isinstance(pattern, Lengths) else float(queries * keys)
        each = pattern.macs(dim, v.shape[-1]) or 0.0
        if isinstance(pattern, ComputedPattern) and pairs:
            width = each / pairs
        macs = each * lists
        self.attended.append(
            Attended(name, lists, queries, keys, dim, width, pairs, every, macs, computed, choice)
        )


class EnterSection:
    """Forward pre-hook that opens a section in the thread that counts."""

    def __init__(self, meter: MacCounter, section: Section) -> None:
        self.meter, self.section = meter, section

    def __call__(self, module: Any, args: Any) -> None:
        if MODEL_CALL.meter is self.meter:
            self.meter.enter(self.section)


class LeaveSection(EnterSection):
    """Forward hook that closes it, also when the module raised."""

    def __call__(self, module: Any, args: Any, output: Any = None) -> None:
        if MODEL_CALL.meter is self.meter:
            self.meter.leave(self.section)
