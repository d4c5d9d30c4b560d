"""Which of a host's own hooks use the tensors they see: seen in a dry run, not guessed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsiattn.runtime.hook_tools import tensors_in


class HostRecords:
    """The hooks of a `meta_copy`, watched.

    Attributes:
        readers: Names of the modules whose tensors a hook kept, or computed something from.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.readers: set[str] = set()
        self.ours: set[int] = set()
        self.watch()

    def leave_out(self) -> None:
        """Hooks that are there now and not watched are no host's."""
        self.ours = {id(hook) for _, _, _, hook in self._unwatched()}

    def watch(self) -> bool:
        """Watch all hooks; some hosts register theirs in their first forward pass.

        Returns:
            Whether there are any that were not watched before.
        """
        fresh = list(self._unwatched())
        for name, hooks, key, hook in fresh:
            hooks[key] = _Watched(hook, name, self.readers)
        return bool(fresh)

    def _unwatched(self) -> Iterator[tuple[str, dict[int, Any], int, Any]]:
        for name, module in self.model.named_modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if not isinstance(hook, _Watched) and id(hook) not in self.ours:
                        yield name, hooks, key, hook


class _Operations(TorchFunctionMode):
    """Notes whether anything was computed from these tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.watched = {id(tensor) for tensor in tensors}
        self.any = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tensors_in((args, kwargs))
        self.any |= any(id(operand) in self.watched for operand in operands)
        return func(*args, **(kwargs or {}))


class _Watched:
    """A hook that tells whether it used what it was given."""

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
