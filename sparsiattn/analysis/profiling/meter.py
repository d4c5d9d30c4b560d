"""What one forward pass spends its multiply-accumulates on, counted while it runs.

`torch.utils.flop_counter` counts every operation. Its count goes to the innermost open section:
hooks open those of blocks and attention modules, and sites open those of their planner and of
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
from sparsiattn.patching.flop_counter import flop_counter, macs_of
from sparsiattn.patching.report import summary_pairs
from sparsiattn.runtime import BlockRuntime, settings
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.strategies import Planner

MHSA, PREDICTOR, TOKENS = "mhsa", "predictor", "tokens"
ATTENTION, MLP, REST = "attention", "mlp", "rest"
"""Parts: QK^T and AV; choosing keys; choosing tokens; the rest of attention modules; the rest of
the blocks around them; the rest of the model."""

Section = tuple[str, str]
"""A part, and the site, module or block by whose name it goes."""
T = TypeVar("T")


@dataclass(frozen=True)
class CountedCall:
    """One attention call, its figures those of the whole batch.

    Attributes:
        site: Path of the site in the model that runs.
        lists: Images, windows and heads, each with its own queries and keys.
        queries: Queries of each list.
        keys: Keys of each list.
        dim: Width of a key.
        width: Width of a key and its value together, in the mean over pairs.
        pairs: (query, key) pairs of each list that the pattern keeps, without summary keys.
        all_pairs: Pairs of each list that there are.
        macs: MACs of the pattern, summary keys and their pooling included.
        computed: MACs that ran; None if nothing could tell.
        choice: The kernel, planning counted in its speed; None for the host's own attention.
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
    """The sections of one forward pass in one thread.

    Attributes:
        names: Path in the model that runs, by a patch's key and its own name of a site.
        spent: MACs by section.
        calls: Attention calls in the order they ran.
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
        """Count what this thread does inside the block."""
        with settings.setting("meter", self), self._counter:
            yield self
            self._settle()

    @contextmanager
    def watching(self, module: nn.Module, section: Section) -> Iterator[None]:
        """Hook a module, so that its forward pass is a section while this counter counts."""
        # first to come and last to go, so that what other hooks do counts too; the second also runs
        # when the module raises
        with (
            module.register_forward_pre_hook(self._hook(self.enter, section), prepend=True),
            module.register_forward_hook(self._hook(self.leave, section), always_call=True),
        ):
            yield

    def _hook(self, action: Callable[[Section], None], section: Section) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # another thread may run the same module, and is not counted
            if settings.meter is self:
                action(section)

        return hook

    def enter(self, section: Section) -> None:
        """Open a section inside the present one."""
        self._settle()
        self._open.append(section)

    def leave(self, section: Section) -> None:
        """Close a section; that it never opened (an earlier hook raised) is no error."""
        self._settle()
        if self._open[-1] == section:
            self._open.pop()

    @contextmanager
    def section(self, part: str, name: str) -> Iterator[None]:
        """Put what the block does down to a section."""
        self.enter((part, name))
        try:
            yield
        finally:
            self.leave((part, name))

    def _settle(self) -> None:
        """Put what was counted since the last call down to the innermost section."""
        total = macs_of(self._counter)
        self.spent[self._open[-1]] += total - self._settled
        self._settled = total

    def _spend(self, section: Section, call: Callable[[], T]) -> tuple[T, int]:
        """What a call returns, and the MACs that the counter saw."""
        before = self.spent[section]
        with self.section(*section):
            output = call()
        return output, self.spent[section] - before

    def name(self, runtime: SiteRuntime | BlockRuntime) -> str:
        """Path of a site in the model that runs."""
        return self.names[runtime.owner.key, runtime.site.name]

    def choosing(self, block: BlockRuntime) -> AbstractContextManager[None]:
        """The section of a block that chooses tokens."""
        return self.section(TOKENS, self.name(block))

    def plan(self, runtime: SiteRuntime, planner: Planner, inputs: AttentionInputs) -> Pattern:
        """The finished pattern of one call."""
        plans: list[Pattern] = []

        def recorded_planner(inputs: AttentionInputs) -> Pattern:
            plans.append(planner(inputs))
            return plans[-1]

        name = self.name(runtime)
        pattern, macs = self._spend(
            (PREDICTOR, name), lambda: runtime.plan(recorded_planner, inputs)
        )
        if plans:
            self._planning[name] = cost.planning_of(plans[0], macs, inputs)
        return pattern

    def compute(
        self, runtime: SiteRuntime, choice: Choice, inputs: AttentionInputs, pattern: Pattern
    ) -> Tensor:
        """What the chosen kernel returns."""
        name, kernel = self.name(runtime), choice.kernel
        uncounted = kernel.uncounted_macs(inputs, pattern)
        if uncounted is None:
            output, computed = self._spend((MHSA, name), lambda: kernel(inputs, pattern))
            if not computed:  # an operation that torch's counter does not know
                work = kernel.work(inputs, pattern)
                uncounted = None if work is None else round(work.macs)
        else:
            # under a dispatch mode, as the counter is, Dynamo would run a compiled kernel eagerly
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
        """What the host's own attention at a site returns."""
        name, pattern = self.name(runtime), Dense(call.q.shape[-2], call.k.shape[-2])
        output, computed = self._spend((MHSA, name), call.dense)
        counted = CountedCall.of(name, (call.q, call.k, call.v), pattern)
        self.calls.append(replace(counted, computed=computed))
        return output
