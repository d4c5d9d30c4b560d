"""`Kernel`, the contract of a kernel, and `choose`, which picks one for a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import ComputedPattern, Pattern
from sparsiattn.errors import KernelRefused, RenamedMembers
from sparsiattn.kernels import cost
from sparsiattn.kernels.cost import CallShape, Planning
from sparsiattn.kernels.prices import Work


class Kernel(RenamedMembers):
    """One way to compute a pattern. Kernels hold no state; one instance serves every site.

    `why_not` decides which calls a kernel takes: if it returns an empty list, the call must work.
    ``auto`` takes the usable kernel with the highest `speed`; a ``last_resort`` only if no other
    works. Both methods may read the site, the options, the shapes, strides, dtypes and devices of
    tensors, grad mode, autocast and inference mode, but never the values of tensors: answers are
    cached for calls that agree in all of these. Call `sparsiattn.kernels.cost.reload` after
    anything that changes an answer, such as compiling a kernel.

    Attributes:
        registers_as: The kind of plug-in, for the registry.
        name: Name of the kernel, as in ``kernel="gather"``.
        summary: One line about what it does.
        differentiable: Whether it has a backward pass.
        last_resort: Whether ``auto`` takes it only if no other kernel works.
        supports_computed: Whether it computes patterns that select no keys (`ComputedPattern`).
            If not, `why_not` is never called with such a pattern.

    >>> from sparsiattn.testing.kernel import cases
    >>> class Plain(Kernel):
    ...     name = "plain"
    ...     def why_not(self, inputs, pattern):
    ...         return [] if inputs.bias is None else ["does not support the model's mask"]
    ...     def speed(self, inputs, pattern):
    ...         return 0.5  # half as fast as dense attention
    ...     def __call__(self, inputs, pattern):
    ...         logits = inputs.scale * inputs.q @ inputs.k.mT
    ...         kept = logits.masked_fill(~pattern.to_mask(), float("-inf"))
    ...         return kept.softmax(-1) @ inputs.v
    >>> _, inputs, pattern = next(cases())
    >>> Plain().why_not(inputs, pattern), Plain()(inputs, pattern).shape
    ([], torch.Size([2, 3, 21, 6]))
    """

    renamed_members: ClassVar[Mapping[str, str]] = {
        "unavailable": "why_unavailable",
        "hidden_macs": "uncounted_macs",
        "computes_derived": "supports_computed",
    }

    registers_as: ClassVar[str] = "kernels"
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    differentiable: ClassVar[bool] = True
    last_resort: ClassVar[bool] = False
    supports_computed: ClassVar[bool] = False

    def why_unavailable(self) -> list[str]:
        """Reasons why this kernel cannot run on this machine at all; empty if it can."""
        return []

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        """Every reason why this call is refused; empty if it works. Never raises."""
        raise NotImplementedError

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work | None:
        """The work of the call, counted from shapes.

        `speed` multiplies it by the prices that `tune` measures.

        Returns:
            The work; None if the kernel overrides `speed`.
        """
        return None

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int | None:
        """Multiply-accumulates that `torch.utils.flop_counter` does not count, padding included.

        Returns:
            All MACs of the call for custom and compiled operators; None if the counter sees every
            product.
        """
        return None

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        """Reasons why ``auto`` should not take a call that would work, such as slow compilation.

        Called after `why_not` returned an empty list. A kernel that the user named runs anyway.
        """
        return []

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        """Prepare later calls of this shape, for example by compiling.

        `Patch.warmup` calls it for calls that `why_not` accepts; the operands require gradients
        if the model trains.
        """

    def repeatable(
        self, inputs: AttentionInputs, pattern: Pattern
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """A function of q, k and v that repeats this call for operands of the same layout.

        It must not hold references to the operands.

        Returns:
            The function; None if the pattern depends on the values of the operands.
        """
        return None

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        """Expected speed relative to dense attention (1.0), from shapes only; excludes planning."""
        work = self.work(inputs, pattern)
        if work is None:
            raise NotImplementedError(f"{type(self).__name__} must override work() or speed()")
        return cost.speed(self.name, work, CallShape.of(inputs))

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        """Attention over the pattern's pairs, ``[B, H, Nq, Dv]``; a row without a key is zero."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for one call, and why other kernels refused it.

    Attributes:
        kernel: The chosen kernel.
        refusals: Names and reasons of the kernels that refused.
        speed: Expected speed of the kernel, planning excluded, relative to dense attention.
        planning: Expected time of planning, divided by that of dense attention; 0 until `after`
            counts it.
        call: Shape of the call it was chosen for.
    """

    kernel: Kernel
    refusals: tuple[tuple[str, tuple[str, ...]], ...]
    speed: float
    planning: float = 0.0
    call: CallShape | None = None

    @property
    def expected(self) -> float:
        """Expected speed relative to dense attention, planning included."""
        return 0.0 if self.speed <= 0 else 1.0 / (1.0 / self.speed + self.planning)

    @property
    def pays(self) -> bool:
        """Whether the expected saving exceeds the time that Python takes at the site."""
        if self.call is None or self.expected <= 0:
            return self.expected >= 1.0
        saved = cost.dense_seconds(self.call) * (1.0 - 1.0 / self.expected)
        return saved >= cost.site_seconds(self.call.device)

    def after(self, planning: Planning) -> Choice:
        """The same choice with the time of planning counted."""
        return self if self.call is None else replace(self, planning=planning.share(self.call))


def refusals(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
    """All reasons why a kernel refuses a call.

    If the kernel of a plug-in raises, which it should not, the error counts as a reason.
    """
    try:
        return _ask_named(kernel, inputs, pattern)[0]
    except Exception as error:
        return [_fault(error)]


def _refusals(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
    reasons = kernel.why_unavailable()
    if reasons:
        return reasons
    if isinstance(pattern, ComputedPattern) and not kernel.supports_computed:
        return [f"needs a pattern that selects keys, got a {type(pattern).__name__} pattern"]
    return kernel.why_not(inputs, pattern)


def _fault(error: Exception) -> str:
    return f"its check of the call raised {type(error).__name__}: {error}"


def _ask(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> tuple[list[str], float]:
    """Reasons why ``auto`` should not take a kernel, and its speed if there are none."""
    try:
        reasons = _refusals(kernel, inputs, pattern) or kernel.not_ready(inputs, pattern)
        reasons = reasons or cost.failures(kernel.name, CallShape.of(inputs))
        return reasons, 0.0 if reasons else kernel.speed(inputs, pattern)
    except Exception as error:
        return [_fault(error)], 0.0


def _ask_named(
    kernel: Kernel, inputs: AttentionInputs, pattern: Pattern
) -> tuple[list[str], float]:
    """As `_ask`, for a kernel that the user named.

    Such a kernel may compile first, so `not_ready` is not called; its errors reach the caller.
    """
    reasons = _refusals(kernel, inputs, pattern)
    return reasons, 0.0 if reasons else kernel.speed(inputs, pattern)


def choose(
    kernels: Sequence[Kernel], inputs: AttentionInputs, pattern: Pattern, *, explicit: bool
) -> Choice:
    """The fastest kernel that takes this call.

    Args:
        kernels: The candidates.
        inputs: The operands of the call.
        pattern: The pattern to compute.
        explicit: Whether the user named the kernel, so that there is no other to fall back to.

    Raises:
        KernelRefused: No kernel takes the call; the message lists the reasons of all of them.
    """
    ask = _ask_named if explicit else _ask
    refused: list[tuple[str, tuple[str, ...]]] = []
    best, fastest = None, 0.0
    for kernel in kernels:  # a loop, not max(key=...), which older compilers cannot trace
        reasons, speed = ask(kernel, inputs, pattern)
        if reasons:
            refused.append((kernel.name, tuple(reasons)))
        elif best is None or _beats(kernel, speed, best, fastest):
            best, fastest = kernel, speed
    if best is None:
        raise KernelRefused(_refusal_message(inputs, pattern, refused, explicit))
    return Choice(best, tuple(refused), fastest, call=CallShape.of(inputs))


def _beats(kernel: Kernel, speed: float, best: Kernel, fastest: float) -> bool:
    return best.last_resort if kernel.last_resort != best.last_resort else speed > fastest


def _refusal_message(
    inputs: AttentionInputs,
    pattern: Pattern,
    refused: Sequence[tuple[str, Sequence[str]]],
    explicit: bool,
) -> str:
    q, kind = inputs.q, type(pattern).__name__
    outcome = "use kernel='auto' to allow another one" if explicit else "every kernel refused"
    lines = [
        f"no kernel computes a {kind} pattern at site {inputs.site.name!r} for q "
        f"{tuple(q.shape)}, k {tuple(inputs.k.shape)}, {q.dtype} on {q.device}; {outcome}",
        *(f"  {name}: {'; '.join(reasons)}" for name, reasons in refused),
    ]
    return "\n".join(lines)
