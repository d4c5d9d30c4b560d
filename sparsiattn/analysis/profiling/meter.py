"""Count the multiply-accumulates of one forward pass by section.

`torch.utils.flop_counter` counts every operation. The count is added to the innermost open section:
hooks open sections of blocks and attention modules, and sites open sections of their planner and of
attention itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from sparsiattn.attention import AttentionInputs, ComputedPattern, Dense, HostCall, Lengths, Pattern
from sparsiattn.kernels import Choice, cost
from sparsiattn.kernels.planning_work import planning_of
from sparsiattn.patching.flop_counter import flop_counter, macs_of
from sparsiattn.patching.site_report import summary_pairs
from sparsiattn.runtime import BlockRuntime, settings
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.strategies import Planner

MHSA, PREDICTOR, TOKENS = "mhsa", "predictor", "tokens"
ATTENTION, MLP, REST = "attention", "mlp", "rest"
"""Parts: QK^T and AV; selection of keys; selection of tokens; the rest of attention modules; the
rest of their blocks; the rest of the model."""

Section = tuple[str, str]
"""A part, and the name of its site, module or block."""
T = TypeVar("T")


@dataclass(frozen=True)
class CountedCall:
    """One attention call, with figures for the whole batch.

    Attributes:
        site: Path of the site in the profiled model.
        lists: Number of images times windows times heads, each with its own queries and keys.
        queries: Number of queries per list.
        keys: Number of keys per list.
        dim: Channels of a key.
        width: Channels of a key plus its value, the mean over pairs.
        pairs: Number of (query, key) pairs per list that the pattern keeps, without summary keys.
        all_pairs: Number of all pairs per list.
        macs: MACs of the pattern, including summary keys and their pooling.
        computed: MACs that ran; None if unknown.
        choice: The kernel, with planning included in its speed; None for the host's own attention.
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
    computed: int | None = None
    choice: Choice | None = None

    @classmethod
    def of(
        cls, site: str, operands: tuple[Tensor, Tensor, Tensor], pattern: Pattern
    ) -> CountedCall:
        """The call of q ``[..., Nq, D]``, k ``[..., Nk, D]`` and v ``[..., Nk, Dv]``."""
        q, k, v = operands
        lists, queries, keys = q.shape[:-2].numel(), q.shape[-2], k.shape[-2]
        dim, value_dim = q.shape[-1], v.shape[-1]
        pairs = (pattern.pairs() or 0.0) - summary_pairs(pattern)
        all_pairs = pairs if isinstance(pattern, Lengths) else float(queries * keys)
        macs = pattern.macs(dim, value_dim) or 0.0
        computes = isinstance(pattern, ComputedPattern) and pairs
        width = macs / pairs if computes else float(dim + value_dim)
        return cls(site, lists, queries, keys, dim, width, pairs, all_pairs, macs * lists)


class MacCounter:
    """Counts the MACs of one forward pass in one thread.

    Attributes:
        names: Path of a site in the profiled model, by the key of its patch and its name there.
        spent: MACs by section.
        calls: Attention calls in order of execution.
    """

    def __init__(self, names: dict[tuple[int, str], str]) -> None:
        self.names = names
        self.spent: defaultdict[Section, int] = defaultdict(int)
        self.calls: list[CountedCall] = []
        self._counter = flop_counter()
        self._open: list[Section] = [(REST, "")]
        self._settled = 0
        self._planning: dict[str, cost.Planning] = {}

    @contextmanager
    def counting(self) -> Iterator[MacCounter]:
        """Count the operations of this thread inside the block."""
        with settings.setting("meter", self), self._counter:
            yield self
            self._settle()

    @contextmanager
    def watching(self, module: nn.Module, section: Section) -> Iterator[None]:
        """Make the forward pass of a module a section, while this counter is counting."""
        # the outermost hooks, so that operations of other hooks count too; the second hook also
        # runs if the module raises
        with (
            module.register_forward_pre_hook(self._hook(self.enter, section), prepend=True),
            module.register_forward_hook(self._hook(self.leave, section), always_call=True),
        ):
            yield

    def _hook(self, action: Callable[[Section], None], section: Section) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # another thread that runs the same module is not counted
            if settings.meter is self:
                action(section)

        return hook

    def enter(self, section: Section) -> None:
        """Open a section inside the current one."""
        self._settle()
        self._open.append(section)

    def leave(self, section: Section) -> None:
        """Close a section, if it is open; it is not if an earlier hook raised."""
        self._settle()
        if self._open[-1] == section:
            self._open.pop()

    @contextmanager
    def section(self, part: str, name: str) -> Iterator[None]:
        """Count the operations in a with block for a section."""
        self.enter((part, name))
        try:
            yield
        finally:
            self.leave((part, name))

    def _settle(self) -> None:
        """Add the MACs counted since the last call to the innermost section."""
        total = macs_of(self._counter)
        self.spent[self._open[-1]] += total - self._settled
        self._settled = total

    def _spend(self, section: Section, call: Callable[[], T]) -> tuple[T, int]:
        """Make a call in a section; returns its result and its MACs."""
        before = self.spent[section]
        with self.section(*section):
            output = call()
        return output, self.spent[section] - before

    def name(self, runtime: SiteRuntime | BlockRuntime) -> str:
        """Path of a site in the profiled model."""
        return self.names[runtime.owner.key, runtime.site.name]

    def choosing(self, block: BlockRuntime) -> AbstractContextManager[None]:
        """The section of a block's token selection."""
        return self.section(TOKENS, self.name(block))

    def plan(self, runtime: SiteRuntime, planner: Planner, inputs: AttentionInputs) -> Pattern:
        """Plan one call, and count its MACs; returns the finished pattern."""
        plans: list[Pattern] = []

        def recorded_planner(inputs: AttentionInputs) -> Pattern:
            plans.append(planner(inputs))
            return plans[-1]

        name = self.name(runtime)
        pattern, macs = self._spend(
            (PREDICTOR, name), lambda: runtime.plan(recorded_planner, inputs)
        )
        if plans:
            self._planning[name] = planning_of(plans[0], macs, inputs)
        return pattern

    def compute(
        self, runtime: SiteRuntime, choice: Choice, inputs: AttentionInputs, pattern: Pattern
    ) -> Tensor:
        """Run the chosen kernel, and count its MACs."""
        name, kernel = self.name(runtime), choice.kernel
        uncounted = kernel.uncounted_macs(inputs, pattern)
        if uncounted is None:
            output, computed = self._spend((MHSA, name), lambda: kernel(inputs, pattern))
            if not computed:  # torch's counter does not support the operation
                work = kernel.work(inputs, pattern)
                uncounted = None if work is None else round(work.macs)
        else:
            # Dynamo would run a compiled kernel eagerly under the counter's dispatch mode
            with _disable_current_modes():
                output = kernel(inputs, pattern)
        if uncounted is not None:
            computed = uncounted
            self.spent[MHSA, name] += uncounted
        if name in self._planning:
            choice = choice.after(self._planning[name])
        call = CountedCall.of(name, (inputs.q, inputs.k, inputs.v), pattern)
        self.calls.append(replace(call, computed=computed or None, choice=choice))
        return output

    def dense(self, runtime: SiteRuntime, call: HostCall) -> Tensor:
        """Run the host's own attention at a site, and count its MACs."""
        name, pattern = self.name(runtime), Dense(call.q.shape[-2], call.k.shape[-2])
        output, computed = self._spend((MHSA, name), call.dense)
        counted = CountedCall.of(name, (call.q, call.k, call.v), pattern)
        self.calls.append(replace(counted, computed=computed))
        return output
