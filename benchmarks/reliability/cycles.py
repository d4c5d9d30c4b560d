"""A thousand times patched and unpatched: does anything grow or change?"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from reliability.hosts import Host, hooks_on
from reliability.lanes import KINDS, fresh

PAGE_KIB = 4


def run(
    cycles: int, forgotten: int = 100, warm: int = 2, kinds: int | None = None
) -> dict[str, Any]:
    """Cycles over all ways in, with a forward pass each, after ``warm`` rounds of every kind; then
    models that are dropped while they are patched."""
    models = {family: fresh(Host(family=family)) for family in ("vit", "unfused", "swin")}
    before = {family: _bits(model) for family, model in models.items()}
    rotation = _rotation()[:kinds]
    for turn in range(warm * len(rotation)):
        _cycle(models, rotation[turn % len(rotation)])
    counts = [_count()]
    for turn in range(cycles):
        _cycle(models, rotation[turn % len(rotation)])
        if turn + 1 in (cycles // 2, cycles):
            counts.append(_count())
    changed = [family for family, model in models.items() if not _same(model, before[family])]
    return {
        "cycles": cycles,
        "resident_mib": [round(kib / 1024, 1) for kib, _ in counts],
        "objects": [objects for _, objects in counts],
        "hooks_left": sum(hooks_on(model) for model in models.values()),
        "changed_models": changed,
        "dropped_while_patched": forgotten,
        "still_alive": _forgotten(forgotten),
    }


def _rotation() -> list[Any]:
    """Every way in, those that take longest to patch once in eight turns."""
    slow = [kind for kind in KINDS if kind[1] in ("token_drop", "token_merge", "hybrid", "ats")]
    fast = [kind for kind in KINDS if kind[1] is not None and kind not in slow]
    return [kind for one in slow for kind in [*(fast + fast)[:7], one]]


def _cycle(models: dict[str, nn.Module], kind: Any) -> None:
    family, strategy, options = kind
    model = models[family]
    with torch.no_grad(), sparsiattn.patch(model, strategy, only_if_faster=False, **options):
        model(torch.zeros(1, 3, 16, 16))


def _count() -> tuple[int, int]:
    """Resident memory in KiB, and objects that the garbage collector knows."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * PAGE_KIB, len(gc.get_objects())


def _bits(model: nn.Module) -> tuple[dict[str, Tensor], list[Any], Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        return state, modules, model(torch.ones(1, 3, 16, 16))


def _same(model: nn.Module, before: Any) -> bool:
    """The same weights, modules, classes and output."""
    (old, modules, output), (now, others, again) = before, _bits(model)
    weights = list(old) == list(now) and all(torch.equal(old[n], t) for n, t in now.items())
    return weights and modules == others and torch.equal(output, again)


def _forgotten(count: int) -> int:
    """How many models are still there after they were patched, run and dropped."""
    alive = []
    kinds = [kind for kind in KINDS if kind[1] is not None]
    for turn in range(count):
        family = kinds[turn % len(kinds)][0]
        model = fresh(Host(family=family))
        live = sparsiattn.patch(
            model, kinds[turn % len(kinds)][1] or "", only_if_faster=False,
            **kinds[turn % len(kinds)][2],
        )  # fmt: skip
        model(torch.zeros(1, 3, 16, 16)).sum().backward()
        alive.append(weakref.ref(model))
        del model, live
    gc.collect()
    return sum(one() is not None for one in alive)
