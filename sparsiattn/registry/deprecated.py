"""Packages with the names of functions that were public before `list_kernels` and the like."""

from __future__ import annotations

from types import ModuleType

from sparsiattn.errors import warn_renamed
from sparsiattn.registry import listing


class CallablePackage(ModuleType):
    """A package that can be called as the deprecated listing function of the same name.

    A package sets it as the ``__class__`` of its module, as Python looks up ``__call__`` in the
    type and not in the module.
    """

    def __call__(self) -> dict[str, listing.Info]:
        """The result of ``list_NAME()``."""
        kind = self.__name__.rpartition(".")[2]
        warn_renamed(f"sparsiattn.{kind}()", f"sparsiattn.list_{kind}()")
        list_kind: dict[str, listing.Info] = getattr(listing, f"list_{kind}")()
        return list_kind
