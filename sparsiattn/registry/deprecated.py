"""Packages that bear the name of a function that was public before `list_kernels` and the like."""

from __future__ import annotations

from types import ModuleType

from sparsiattn.errors import warn_renamed
from sparsiattn.registry import listing


class CallablePackage(ModuleType):
    """A package that can still be called as the listing function of its old name.

    A package takes it as the ``__class__`` of its module: Python looks up ``__call__`` in the type,
    never in a module's own names.
    """

    def __call__(self) -> dict[str, listing.Info]:
        """What ``list_NAME()`` returns."""
        kind = self.__name__.rpartition(".")[2]
        warn_renamed(f"sparsiattn.{kind}()", f"sparsiattn.list_{kind}()")
        list_kind: dict[str, listing.Info] = getattr(listing, f"list_{kind}")()
        return list_kind
