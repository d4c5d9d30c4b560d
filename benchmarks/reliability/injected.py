"""Exceptions at every hook point: what is the model afterwards, and what are its neighbours?

Points are every hook that the patch registered, every module of the host, planners of sites and
blocks, and the methods of kernels; at patch time, methods of the strategy and of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

import sparsiattn
from reliability.hosts import Host, hooks_on
from reliability.lanes import KINDS, Lane, fresh, lane
from sparsiattn.registry import REGISTRY


class Injected(RuntimeError):
    """An error of the host, say out of memory."""


class Interrupted(KeyboardInterrupt):
    """Control-C in the middle; no hook hears of it."""


Point = tuple[str, Callable[[Callable[[], None]], Any]]
"""Its name, and a context manager in which the given function is called there."""


@dataclass
class Seen:
    points: int = 0
    raised: int = 0
    checks: int = 0
    wrong: list[str] = field(default_factory=list)

    def check(self, right: bool, what: str) -> None:
        self.checks += 1
        if not right:
            self.wrong.append(what)


def run(
    kinds: Sequence[int] = range(len(KINDS)), every: int = 1, patching: int = 3
) -> dict[str, Any]:
    """These kinds of patches; of each every so many-th point of a forward pass, and every
    ``patching * every``-th of patching itself."""
    seen, neighbour = Seen(), lane(0)
    with torch.no_grad():
        for number in kinds:
            if KINDS[number][1] is not None:
                _forwards(number, neighbour, seen, every)
                _patching(number, neighbour, seen, patching * every)
        _registering(seen)
    return {
        "points": seen.points, "raised": seen.raised, "checks": seen.checks,
        "wrong": len(seen.wrong), "wrong_cases": seen.wrong[:20],
    }  # fmt: skip


def _forwards(number: int, neighbour: Lane, seen: Seen, every: int) -> None:
    """Raise in a forward pass; the next ones have to be right, and so has undoing the patch."""
    served = lane(number)
    dense = _dense(served)
    for name, inject in list(points(served.model))[::every]:
        seen.points += 1
        for kind in (Injected, Interrupted):
            for features in (False, True):
                _raise_once(served, inject, kind, features, seen)
                what = f"{served.name}: {kind.__name__} at {name}"
                seen.check(neighbour.right(), f"another model after {what}")
                seen.check(served.right_features(), f"features after {what}")
                _raise_once(served, inject, kind, features, seen)
                seen.check(served.right(), f"next forward after {what}")
    sparsiattn.unpatch(served.model)
    count = len(list(points(lane(number).model)))
    for index in range(0, count, 5 * every):
        for kind in (Injected, Interrupted):
            served = lane(number)
            name, inject = list(points(served.model))[index]
            _raise_once(served, inject, kind, False, seen)
            sparsiattn.unpatch(served.model)
            what = f"{served.name}: unpatched after {kind.__name__} at {name}"
            seen.check(torch.equal(served.model(served.x), dense), what)
            seen.check(not hooks_on(served.model), f"hooks left: {what}")


def _dense(served: Lane) -> torch.Tensor:
    live = sparsiattn.patch_of(served.model)
    assert live is not None
    with live.disabled():
        out: torch.Tensor = served.model(served.x)
        return out


def _raise_once(served: Lane, inject: Any, kind: Any, features: bool, seen: Seen) -> None:
    def fire() -> None:
        raise kind

    try:
        with inject(fire):
            served.model.forward_features(served.x) if features else served.model(served.x)
    except (Injected, Interrupted, sparsiattn.SparsiattnError):  # a kernel's is an answer
        seen.raised += 1


def points(model: nn.Module) -> Iterator[Point]:
    """Every place where a forward pass of a patched model can raise, before it and after it."""
    live = sparsiattn.patch_of(model)
    assert live is not None
    for late in (False, True):
        when = "after" if late else "before"
        for name, module in model.named_modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    what = f"{when} {type(hook).__name__} of {name or 'the model'}"
                    yield what, _item(hooks, key, late)
            yield f"{when} forward of {name or 'the model'}", _method(module, "forward", late)
        for runtime in live.runtimes:
            if not isinstance(runtime.planner, nn.Module):
                where = _attribute(runtime, "planner", late)
                yield f"{when} the planner of {runtime.site.name}", where
        for block in live.blocks:
            if block.planner is not None:
                yield (
                    f"{when} the planner of {block.block.name}",
                    _attribute(block, "planner", late),
                )
        for kernel in REGISTRY.all("kernels").values():
            for method in ("why_not", "__call__"):
                what = f"{when} {method} of {kernel.name}"
                yield what, _method(type(kernel), method, late)


def _around(real: Any, fire: Callable[[], None], late: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not late:
            fire()
        out = real(*args, **kwargs)
        fire()
        return out

    return call


def _item(table: Any, key: Any, late: bool) -> Any:
    @contextmanager
    def inject(fire: Callable[[], None]) -> Iterator[None]:
        real = table[key]
        table[key] = _around(real, fire, late)
        try:
            yield
        finally:
            table[key] = real

    return inject


def _attribute(owner: Any, name: str, late: bool) -> Any:
    @contextmanager
    def inject(fire: Callable[[], None]) -> Iterator[None]:
        real = getattr(owner, name)
        setattr(owner, name, _around(real, fire, late))
        try:
            yield
        finally:
            setattr(owner, name, real)

    return inject


def _method(owner: Any, name: str, late: bool) -> Any:
    """A method of an object or class; one that was inherited is taken away again."""

    @contextmanager
    def inject(fire: Callable[[], None]) -> Iterator[None]:
        own = vars(owner).get(name)
        setattr(owner, name, _around(getattr(owner, name), fire, late))
        try:
            yield
        finally:
            delattr(owner, name) if own is None else setattr(owner, name, own)

    return inject


STEPS = ("hold", "hook_up", "_hook_site", "_add_planner", "watch", "_hook_block", "lift", "swap")
"""Functions of `sparsiattn.patching.install` that may be interrupted."""


def _patching(number: int, neighbour: Lane, seen: Seen, every: int) -> None:
    """Raise while a model is being patched: it has to be as before, and patchable."""
    family, strategy, options = KINDS[number]
    assert strategy is not None
    model = fresh(Host(family=family))
    x = torch.zeros(1, 3, 16, 16)
    dense = model(x)
    for what, inject in list(_patch_points(model, strategy))[::every]:
        seen.points += 1
        for kind in (Injected, Interrupted):

            def fire(kind: Any = kind) -> None:
                raise kind

            try:
                with inject(fire):
                    sparsiattn.patch(model, strategy, only_if_faster=False, **options)
            except (Injected, Interrupted, sparsiattn.SparsiattnError):
                seen.raised += 1
            case = f"{strategy}: {kind.__name__} at {what} while patching"
            sparsiattn.unpatch(model)
            seen.check(not hooks_on(model), f"hooks after {case}")
            seen.check(torch.equal(model(x), dense), f"the model after {case}")
            seen.check(neighbour.right(), f"another model after {case}")
    with sparsiattn.patch(model, strategy, only_if_faster=False, **options):
        seen.check(bool(model(x).isfinite().all()), f"{strategy} after all that")


def _patch_points(model: nn.Module, strategy: str) -> Iterator[Point]:
    owners = [REGISTRY.get("strategies", strategy)]
    with sparsiattn.patch(model, strategy, only_if_faster=False) as live:
        owners.append(type(REGISTRY.get("backbones", live.backbone)))
    for owner in owners:
        for name in dir(owner):
            # as it stands in the class: names of earlier versions warn when they are looked up
            member = getattr_static(owner, name)
            plain = callable(member) and not isinstance(member, (classmethod, staticmethod))
            if plain and not name.startswith("_"):
                yield f"{owner.__name__}.{name}", _method(owner, name, False)
    from sparsiattn.patching import install

    for name in STEPS:
        yield f"attach: before {name}", _method(install, name, False)
        yield f"attach: after {name}", _method(install, name, True)


def _registering(seen: Seen) -> None:
    """A plug-in whose hook raises is listed as broken, and stops nothing."""
    from types import SimpleNamespace

    from sparsiattn import hookimpl

    for kind in ("strategies", "kernels", "backbones"):

        def hook() -> list[Any]:
            raise Injected

        seen.points += 1
        hook.__name__ = f"sparsiattn_{kind}"
        plugin = SimpleNamespace(**{hook.__name__: hookimpl(hook)})
        with REGISTRY.temporary(plugin, "raises"):
            broken = {info.name for info in REGISTRY.plugins() if info.broken}
            seen.raised += 1
            seen.check("raises" in broken, f"a plug-in whose {kind} raise is not listed")
            seen.check("topk" in sparsiattn.list_strategies(), "the built-in ones are gone")
