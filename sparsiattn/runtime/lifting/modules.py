"""Modules whose hand-written attention is lifted while a patch is active."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.class_swap import Swapped, swap_class, swap_class_back
from sparsiattn.runtime.hook_tools import hook_in_front, pre_hook_in_front
from sparsiattn.runtime.lifting.mode import Lift, Tally
from sparsiattn.runtime.lifting.scores import Scores
from sparsiattn.runtime.lifting.sums import build_sums_of
from sparsiattn.runtime.thread_state import SITE_CALLS


class Lifted(Swapped):
    """Mixin of an attention module's class that lifts its attention while a patch is active."""

    @staticmethod
    def members(host: Any) -> dict[str, Any]:
        return {"forward": _lifted_forward(host)}


def _lifted_forward(host: Any) -> Any:
    @wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        top = SITE_CALLS.top
        if top is None or top[0] is None:
            return host.forward(self, *args, **kwargs)
        tally = Tally()
        with Lift(tally):
            output = without_scores(host.forward(self, *args, **kwargs))
        tally.ended = True
        if not tally.attended:
            raise ModelChanged(
                f"{host.__name__} took another code path than in the dry run at patch time, so its "
                "attention was not intercepted; unpatch() and patch again, or exclude it with "
                "sites="
            )
        return output

    return forward


def without_scores(output: Any, home: int = 0) -> Any:
    """A module's output, with None for the attention weights that it may return with its result.

    Sparse attention has no weights. The fused attention of transformers returns None for them too.

    Args:
        output: The module's output.
        home: Key of the module (see `Lift.home`); scores of other modules stay in the output.
    """
    if isinstance(output, Scores) and output.home == home:
        return output.tensor("return")
    if type(output) in (tuple, list):
        return type(output)([_unless_weights(x, home) for x in output])
    return output


def _unless_weights(value: Any, home: int) -> Any:
    if not isinstance(value, Scores) or value.home != home:
        return value
    return None if value.softmaxed else value.tensor("return")


class ShowWeights:
    """Forward pre-hook and hook of a submodule of a lifted module: its dropout or softmax.

    It makes sure that the user's hooks on that submodule get tensors: the attention weights that
    are used.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if not _is_watched(module):
            return None
        if output is not None:
            return _weights(output) if isinstance(output, Scores) else None
        return tuple(map(_weights, args))


def _weights(value: Any) -> Any:
    return value.used() if isinstance(value, Scores) and value.softmaxed else value


def _is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks that are not `ShowWeights`."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    everywhere = _global_forward_pre_hooks or _global_forward_hooks
    return bool(everywhere) or any(not isinstance(hook, ShowWeights) for hook in hooks)


def show_weights(module: nn.Module) -> list[Any]:
    """Let hooks on parts of a lifted module see attention weights.

    Returns:
        Handles of the registered hooks.
    """
    parts = [part for part in module.modules() if part is not module and not _has_weights(part)]
    show = ShowWeights()
    before = [pre_hook_in_front(part, show) for part in parts]
    return before + [hook_in_front(part, show) for part in parts]


def _has_weights(part: nn.Module) -> bool:
    return next(part.parameters(), None) is not None


def lift(module: nn.Module) -> None:
    """Lift the hand-written attention of a module while a patch is active."""
    swap_class(module, Lifted)


def drop(module: nn.Module) -> None:
    """Undo `lift` and `put_off_sums_of`: give a module its original class back."""
    swap_class_back(module, Lifted)
    build_sums_of(module)
