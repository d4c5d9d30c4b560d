"""The contract of a kernel, and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import ComputedPattern, Pattern
from sparsiattn.errors import KernelRefused, RenamedMembers
from sparsiattn.kernels import cost
from sparsiattn.kernels.cost import CallShape, Planning, Work


class Kernel(RenamedMembers):
    """One way to compute a pattern. Kernels hold no state; one instance serves every site.

    `why_not` is the whole truth about what a kernel takes: if it returns an empty list the call
    must work. ``auto`` takes the usable kernel with the highest `speed`, and one that is a
    ``last_resort`` only where no other works. Both may look at the site, the options, and the
    shapes, strides, dtypes and devices of tensors, at grad mode, autocast and inference mode, but
    never at values: answers are kept for calls that agree in all of these. Whoever changes an
    answer (compiles a kernel, say) calls `sparsiattn.kernels.cost.reload`.

    >>> from sparsiattn.testing.kernel import cases
    >>> class Plain(Kernel):
    ...     name = "plain"
    ...     def why_not(self, inputs, pattern):
    ...         return [] if inputs.bias is None else ["takes no mask of the host"]
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
    """Whether it knows plans that choose no keys (`ComputedPattern`); others are not
    asked."""

    def why_unavailable(self) -> list[str]:
        """Reasons why this kernel cannot run on this machine at all; empty if it can."""
        return []

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        """Every reason why this call is refused; empty if it works. Never raises."""
        raise NotImplementedError

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work | None:
        """What the call does, counted from shapes: enough for a kernel that lets the prices that
        `tune` measures say its `speed`. None where `speed` is overridden."""
        return None

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int | None:
        """What the call computes, padding included, where `torch.utils.flop_counter` cannot see it
        or must not look on (custom and compiled operators); None where it counts every product."""
        return None

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        """Reasons why ``auto`` should not take a call that works, such as a minute of compiling.

        Asked after `why_not` was empty; a kernel that was asked for by name runs all the same.
        """
        return []

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        """Do once what makes later calls of this shape ready; called by `Patch.warmup` with calls
        that `why_not` lets through, with operands that want a gradient if the model trains."""

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        """Expected speed relative to dense attention (1.0), from shapes alone; planning apart."""
        work = self.work(inputs, pattern)
        if work is None:
            raise NotImplementedError(f"{type(self).__name__} must override work() or speed()")
        return cost.speed(self.name, work, CallShape.of(inputs))

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        """Attention over the pattern's pairs, ``[B, H, Nq, Dv]``; a row without a key is zero."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """The kernel taken for one call and what the others said.

    speed: its own, relative to dense attention. planning: expected time of choosing the keys, as a
    share of dense attention's; 0 until `after`. call: the shape it was chosen for.
    """

    kernel: Kernel
    refusals: tuple[tuple[str, tuple[str, ...]], ...]
    speed: float
    planning: float = 0.0
    call: CallShape | None = None

    @property
    def expected(self) -> float:
        """Expected speed relative to dense attention with planning paid."""
        return 0.0 if self.speed <= 0 else 1.0 / (1.0 / self.speed + self.planning)

    def after(self, planning: Planning) -> Choice:
        """The same choice with the time of planning counted."""
        return self if self.call is None else replace(self, planning=planning.share(self.call))


def refusals(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
    """Everything a kernel says against a call. It should not raise; where a plug-in's kernel does,
    that speaks against it too."""
    return _asked(kernel, inputs, pattern, auto=False, trusted=False)[0]


def _asked(
    kernel: Kernel, inputs: AttentionInputs, pattern: Pattern, *, auto: bool, trusted: bool
) -> tuple[list[str], float]:
    """A kernel's refusals and, if there are none, its speed. The fault of one that was asked for by
    name (``trusted``) is the caller's answer."""
    try:
        reasons = kernel.why_unavailable() or _unknown(kernel, pattern)
        reasons = reasons or kernel.why_not(inputs, pattern)
        if not reasons and auto:
            reasons = kernel.not_ready(inputs, pattern)
        return reasons, 0.0 if reasons else kernel.speed(inputs, pattern)
    except Exception as error:
        if trusted:
            raise
        return [f"asked what it takes, it raised {type(error).__name__}: {error}"], 0.0


def _unknown(kernel: Kernel, pattern: Pattern) -> list[str]:
    """Plans that choose no keys are only shown to kernels that know such."""
    if isinstance(pattern, ComputedPattern) and not kernel.supports_computed:
        return [f"attends to chosen keys only, got a {type(pattern).__name__} plan"]
    return []


def choose(
    kernels: Sequence[Kernel], inputs: AttentionInputs, pattern: Pattern, *, explicit: bool
) -> Choice:
    """The fastest kernel that takes this call. An explicit request has one entry and never falls
    back; if nothing is left, the error carries every kernel's reasons."""
    refused = []
    best, fastest = None, 0.0
    for kernel in kernels:  # a loop, not max(key=...), which older compilers cannot trace
        reasons, speed = _asked(kernel, inputs, pattern, auto=not explicit, trusted=explicit)
        if reasons:
            refused.append((kernel.name, tuple(reasons)))
            continue
        if best is None or _beats(kernel, speed, best, fastest):
            best, fastest = kernel, speed
    if best is None:
        raise KernelRefused(_refused(inputs, pattern, refused, explicit))
    return Choice(best, tuple(refused), fastest, call=CallShape.of(inputs))


def _beats(kernel: Kernel, speed: float, best: Kernel, fastest: float) -> bool:
    return best.last_resort if kernel.last_resort != best.last_resort else speed > fastest


def _refused(
    inputs: AttentionInputs,
    pattern: Pattern,
    refusals: Sequence[tuple[str, Sequence[str]]],
    explicit: bool,
) -> str:
    q = inputs.q
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals]
    hint = "use kernel='auto' to let another one run" if explicit else "no kernel is left"
    return "\n".join(
        [
            f"no kernel computes a {type(pattern).__name__} pattern at site "
            f"{inputs.site.name!r} for q {tuple(q.shape)}, k {tuple(inputs.k.shape)}, "
            f"{q.dtype} on {q.device}; {hint}",
            *lines,
        ]
    )
