"""The part of a patch that puts it on disk or on the Hub."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from sparsiattn.runtime.handle import Patch


class Storable:
    """What can be saved; a base of `Patch`."""

    def save(self, directory: str | PathLike[str]) -> Path:
        """Write the delta only: a JSON config and the planners' weights as safetensors. A kill
        on the way leaves what was there before, or what is saved now."""
        from sparsiattn.serialization.saving import save

        self._require_active("save")
        return save(cast("Patch", self), Path(directory))

    def merge_and_export(self, directory: str | PathLike[str]) -> Path:
        """As `save`, and the host's own weights: a whole checkpoint, from which
        `sparsiattn.from_pretrained` makes model and patch. ``model.safetensors`` has the host's own
        names and loads without this library, too."""
        from sparsiattn.serialization.saving import save

        self._require_active("merge_and_export")
        return save(cast("Patch", self), Path(directory), whole=True)

    def push_to_hub(self, repo_id: str, *, whole: bool = False, **options: Any) -> str:
        """What `save` writes (``whole``: what `merge_and_export` writes) as a repository of the
        Hugging Face Hub; gives its address. See `hub.push` for the options."""
        from sparsiattn.serialization.hub import push

        self._require_active("push_to_hub")
        return push(cast("Patch", self), repo_id, whole=whole, **options)

    def _require_active(self, what: str) -> None:
        raise NotImplementedError
