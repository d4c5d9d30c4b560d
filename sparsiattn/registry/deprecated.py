"""Packages with the names of functions that were public before `list_kernels` and the like."""

from __future__ import annotations

import warnings
from types import ModuleType

from sparsiattn.registry import listing


class CallablePackage(ModuleType):
    """A package that can be called as the deprecated listing function of the same name.

    A package sets it as the ``__class__`` of its module, as Python looks up ``__call__`` in the
    type and not in the module. It will be removed in the next minor version.
    """

    def __call__(self) -> dict[str, listing.Info]:
        """The result of ``list_NAME()``."""
        kind = self.__name__.rpartition(".")[2]
        warnings.warn(
            f"sparsiattn.{kind}() is deprecated: call sparsiattn.list_{kind}()",
            DeprecationWarning,
            stacklevel=2,
        )
        list_kind: dict[str, listing.Info] = getattr(listing, f"list_{kind}")()
        return list_kind
