"""What runs at a patched site: the hooks that open and close its scope, and its route."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import NO_IMAGE, Layout, canonical
from sparsiattn.attention.pattern import ComputedPattern, Dense, Pattern
from sparsiattn.attention.sdpa import dense_attention
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import ModelChanged
from sparsiattn.kernels.base import Choice, Kernel, choose
from sparsiattn.kernels.choice_cache import ChoiceCache
from sparsiattn.runtime.cross_layer import leave, notes_at
from sparsiattn.runtime.sdpa_intercept import THREAD, Route, install, note_caller, pop, push
from sparsiattn.strategies import finalize as planning
from sparsiattn.strategies.base import Planner, Strategy

PLANNER = "sparsiattn"
"""Name of the child module that holds a site's learned planner."""

_KEYS = itertools.count(1)

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Query, key, value and mask of one call, as the host laid them out."""
Options = tuple[float, bool, float | None, bool]
"""Its dropout, causal, scale and grouped-query arguments."""

Observer = Callable[[Site, Planner, AttentionInputs], None]
T = TypeVar("T")


class PlannerHome(nn.Module):
    """Gives a planner without weights a module in which a learned token score can live."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner

    def forward(self, inputs: AttentionInputs) -> Pattern:
        return self.planner(inputs)


class SiteRuntime:
    """A site with its strategy, planner and kernels: plain state that copies and pickles."""

    def __init__(
        self,
        site: Site,
        layout: Layout,
        strategy: Strategy,
        planner: Planner,
        kernels: tuple[Kernel, ...],
        explicit: bool,
        owner: Any,
        module: nn.Module,
    ) -> None:
        self.site, self.layout, self.strategy = site, layout, strategy
        self.planner, self.kernels, self.explicit, self.owner = planner, kernels, explicit, owner
        self.module = module
        self.dense, self.selected = False, True
        self.opens = self.closes = False  # first and last of the sites that leave each other notes
        self.block: int | None = None  # of the block it stands in, where tokens may be fewer
        self.last: Choice | None = None
        self.measured: float | None = None  # speed relative to dense attention, planning included
        self.choices = ChoiceCache()

    def __getstate__(self) -> dict[str, Any]:
        # what was measured holds for this machine, and a copy chooses for itself
        return {**self.__dict__, "measured": None, "choices": ChoiceCache()}

    def plan(self, planner: Planner, inputs: AttentionInputs) -> Pattern:
        """The finished pattern of one call; both calls of a differential attention share theirs."""
        shared = THREAD.shared if self.site.shared else None
        if shared is not None:
            THREAD.shared = None
            return shared  # type: ignore[no-any-return]
        pattern = self.finish(planner(inputs), inputs)
        if self.site.shared and not isinstance(pattern, ComputedPattern):
            THREAD.shared = pattern
        return pattern

    def finish(self, pattern: Pattern, inputs: AttentionInputs) -> Pattern:
        """A planner's wish with the strategy's options put in."""
        options = self.strategy
        return planning.finish(
            pattern, inputs, prefix_keys=options.prefix_keys, background=options.background
        )

    def idle(self, n_keys: int) -> bool:
        """Whether the host's own attention runs, known without planning."""
        return self.dense or self.strategy.keeps_all(n_keys)

    def serve(
        self, planner: Planner, token_state: TokenState | None, operands: Operands, options: Options
    ) -> Tensor | None:
        """One call in the host's own layout, or None where the host's attention should run."""
        observer = THREAD.observer
        observed = observer is not None and observer[0] == self.owner.key
        asks = token_state is not None and THREAD.asks and THREAD.asked is None
        # an interrupt may leave a scope open after unpatch(): then the handle is not alive
        if not (observed or asks or (self.owner.alive and not self.idle(operands[1].shape[-2]))):
            return None
        dropout, causal, scale, _ = options
        inputs = canonical(
            self.site, self.layout, *operands, image_of(self.owner),
            scale=scale, dropout=dropout, causal=causal, tile_for=self.strategy.tile_for,
            block_for=self.strategy.block_for, window=getattr(self.module, "window_size", None),
            token_state=token_state,
        )  # fmt: skip
        if self.strategy.uses_cross_layer_state:
            inputs = inputs.replace(cross_layer=notes_at(self))
        if asks:
            THREAD.asked = inputs
        if observer is not None and observed:
            observer[1](self.site, planner, inputs)
            leave(inputs.cross_layer)
            return None
        if not self.owner.alive or self.idle(inputs.n_keys):
            return None
        out = self.attend(planner, inputs)
        if out is not None:
            notify_planner(planner, inputs, out)
            leave(inputs.cross_layer)
            return self.layout.unfold(out, operands[0])
        if hasattr(planner, "after"):
            host = self.host(operands, options)
            notify_planner(planner, inputs, self.layout.fold(host))
            leave(inputs.cross_layer)
            return host
        leave(inputs.cross_layer)
        return None

    def attend(self, planner: Planner, inputs: AttentionInputs) -> Tensor | None:
        """Sparse attention ``[B, H, Nq, Dv]``, or None where the host's own should run."""
        meter = THREAD.meter
        plan = self.plan if meter is None else partial(meter.plan, self)
        pattern = plan(planner, inputs)
        if isinstance(pattern, Dense):
            return None
        if THREAD.warming is not None:
            self.warm(inputs, pattern)
        return self.compute(self.choose(inputs, pattern), inputs, pattern)

    def compute(self, choice: Choice, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        """What the chosen kernel returns."""
        meter = THREAD.meter
        if meter is None:
            return choice.kernel(inputs, pattern)
        return meter.compute(self, choice, inputs, pattern)  # type: ignore[no-any-return]

    def host(self, operands: Operands, options: Options) -> Tensor:
        """What the host's own attention returns."""
        (q, k, v, mask), (dropout, causal, scale, gqa) = operands, options
        meter = THREAD.meter
        if meter is None:
            return dense_attention(q, k, v, mask, dropout, causal, scale=scale, gqa=gqa)
        call = partial(dense_attention, q, k, v, mask, dropout, causal, scale=scale, gqa=gqa)
        return meter.dense(self, operands, call)  # type: ignore[no-any-return]

    def choose(self, inputs: AttentionInputs, pattern: Pattern) -> Choice:
        """The kernel for one call: asked of all kernels once for calls alike."""
        if torch.compiler.is_compiling():  # a traced program may not write, and asks only once
            return choose(self.kernels, inputs, pattern, explicit=self.explicit)
        key = self.choices.key(inputs, pattern)
        found = self.choices.get(key)
        if found is None:
            found = choose(self.kernels, inputs, pattern, explicit=self.explicit)
            self.choices.keep(key, found)
        self.last = found
        return found

    def warm(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        """Let the site's kernels get ready for calls like this one, while `Patch.warmup` runs."""
        from sparsiattn.patching.warmup import warm

        if THREAD.warming == self.owner.key:
            warm(self.kernels, inputs, pattern, training=self.module.training)


def notify_planner(planner: Planner, inputs: AttentionInputs, output: Tensor) -> None:
    """Let a planner that wants to know see what attention returned at its site."""
    after = getattr(planner, "after", None)
    if after is not None:
        after(inputs, output)


def make_route(runtime: SiteRuntime, replica: nn.Module | None = None) -> Route:
    """The function that stands in for the site's call of scaled dot product attention. It only
    refers to ``runtime``, which may still be under construction when a copy is made."""

    def route(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
        gqa: bool,
    ) -> Tensor:
        planner = runtime.planner if replica is None else cast(Planner, replica)
        token_state = THREAD.token_state
        if (
            token_state is not None
            and token_state.owner == runtime.owner.key
            and token_state.layer == runtime.block
        ):
            return carried_attention(
                runtime, planner, token_state, (q, k, v, mask), (dropout, causal, scale, gqa)
            )
        operands, options = (q, k, v, mask), (dropout, causal, scale, gqa)
        out = runtime.serve(planner, None, operands, options)
        return runtime.host(operands, options) if out is None else out

    return route


def carried_attention(
    runtime: SiteRuntime, planner: Planner, token_state: Any, operands: Operands, options: Options
) -> Tensor:
    """Attention of a call whose sequence was made shorter; see `reduced_attention`."""
    from sparsiattn.runtime.reduced_attention import attention

    return attention(runtime, planner, token_state, operands, options)


def metered(method: Callable[..., T]) -> Callable[..., T]:
    """A method of a block that chooses tokens; a `MacCounter` that counts puts it down to planning."""

    @wraps(method)
    def call(self: Any, *args: Any) -> T:
        meter = THREAD.meter
        if meter is None:
            return method(self, *args)
        with meter.choosing(self):
            return method(self, *args)

    return call


class OpenScope:
    """Forward pre-hook of a patched attention module. Importable and picklable; its route, a
    closure, is made again in a copy."""

    def __init__(self, runtime: SiteRuntime) -> None:
        self.__setstate__({"runtime": runtime})

    def __getstate__(self) -> dict[str, Any]:
        return {"runtime": self.runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        install()
        self.runtime: SiteRuntime = state["runtime"]
        self.key = next(_KEYS)
        self.route = make_route(self.runtime)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.runtime.owner.key in THREAD.disabled:
            push(None, self.key)
        elif "_is_replica" in vars(module):  # nn.DataParallel: the replica's own weights
            push(make_route(self.runtime, module._modules.get(PLANNER)), self.key)
        else:
            push(self.route, self.key)
        if self.runtime.site.shared:
            THREAD.shared = None
        if self.runtime.opens:
            THREAD.notes = None
        if not torch.compiler.is_compiling():
            THREAD.routed.discard(self.key)
            note_caller(self.key)


class CloseScope:
    """Forward hook of a patched attention module, called also when the module raised."""

    def __init__(self, opener: OpenScope) -> None:
        self.opener = opener

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        key, owner = self.opener.key, self.opener.runtime.owner
        pop(key)
        if self.opener.runtime.closes:
            THREAD.notes = None
        if torch.compiler.is_compiling() or output is None or owner.key in THREAD.disabled:
            return
        if key not in THREAD.routed:
            raise ModelChanged(
                f"site {self.opener.runtime.site.name!r} ran without calling scaled dot product "
                "attention, so the patch had no effect there: was fused_attn switched off, or "
                "its forward replaced, after patching? unpatch() and patch again"
            )


class WatchImage:
    """Forward pre-hook of the module that takes the image: notes its height and width, from which
    attention at another resolution learns its token grid."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        image = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(image, Tensor) and image.dim() == 4:
            rows, columns = self.owner.patch_size
            # height and width in patches, up to a common factor
            size = (image.shape[-2] * columns, image.shape[-1] * rows)
        elif isinstance(image, Mapping):
            size = NO_IMAGE
        else:
            return
        THREAD.image = (self.owner.key, *size)
        if not torch.compiler.is_compiling():  # for a backward pass in another thread
            self.owner.image = size


def image_of(owner: Any) -> Grid | None:
    """Shape, in patches up to a factor, of the image this thread last gave to the patched model."""
    seen = THREAD.image
    if seen is not None and seen[0] == owner.key:
        return seen[1:]
    return owner.image  # type: ignore[no-any-return]
