"""Observes in a dry run which of a host's own hooks use the tensors that they get."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsiattn.runtime.hook_tools import tensors_in


class HostRecords:
    """Watches the hooks of a `meta_copy`.

    Args:
        modules: The copy's modules, by name.

    Attributes:
        readers: Names of the modules whose tensors a hook stored or used in a computation.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.readers: set[str] = set()
        self.ours: set[int] = set()
        self.watch(modules)

    def leave_out(self, modules: Mapping[str, nn.Module]) -> None:
        """Ignore hooks that exist now and are not watched: they are not the host's."""
        self.ours = {id(hook) for _, _, _, hook in self._unwatched(modules)}

    def watch(self, modules: Mapping[str, nn.Module]) -> bool:
        """Watch all hooks; some hosts register theirs in the first forward pass.

        Returns:
            Whether there were hooks that were not watched before.
        """
        fresh = list(self._unwatched(modules))
        for name, hooks, key, hook in fresh:
            hooks[key] = _Watched(hook, name, self.readers)
        return bool(fresh)

    def _unwatched(
        self, modules: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, dict[int, Any], int, Any]]:
        for name, module in modules.items():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()) if hooks else ():
                    if not isinstance(hook, _Watched) and id(hook) not in self.ours:
                        yield name, hooks, key, hook


class _Operations(TorchFunctionMode):
    """Records whether anything was computed from these tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.watched = {id(tensor) for tensor in tensors}
        self.any = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tensors_in((args, kwargs))
        self.any |= any(id(operand) in self.watched for operand in operands)
        return func(*args, **(kwargs or {}))


class _Watched:
    """A wrapper of a hook that records whether the hook used its arguments."""

    def __init__(self, hook: Any, name: str, readers: set[str]) -> None:
        self.hook, self.name, self.readers = hook, name, readers

    def __call__(self, *arguments: Any) -> Any:
        tensors = tensors_in(arguments[1:])
        before = [sys.getrefcount(x) for x in tensors]
        with _Operations(tensors) as operations:
            result = self.hook(*arguments)
        kept = result is None and before != [sys.getrefcount(x) for x in tensors]
        if kept or operations.any:
            self.readers.add(self.name)
        return result
