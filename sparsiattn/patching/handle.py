"""`Patch`: the handle that `patch` returns; it reports, saves, and undoes what was changed."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sparsiattn.attention.packed import source
from sparsiattn.errors import InvalidOption, renamed_property, warn_renamed
from sparsiattn.patching.install import remove
from sparsiattn.patching.known_calls import call_needs_all
from sparsiattn.patching.report import Report, report
from sparsiattn.patching.site_selection import Sites, watchable
from sparsiattn.patching.survey import refresh
from sparsiattn.patching.warmup import warmup
from sparsiattn.runtime.monitor import Monitor, OnLow, check_options
from sparsiattn.runtime.patch_state import PatchState, live_patches, state_of, unwrap
from sparsiattn.runtime.sdpa_intercept import forget_compiled
from sparsiattn.serialization import hub
from sparsiattn.serialization.save import save


class Patch(PatchState):
    """A live patch of one model: made by `patch`, found again by `patch_of`.

    As a context manager it undoes itself on exit.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
    ...     patch.report().sites[0].density < 0.3
    True
    """

    def unpatch(self) -> nn.Module:
        """Undo everything; the model is bit for bit what it was. Calling it twice is no error."""
        if self.active:
            remove(self)
            forget_compiled()
        return self.model

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def report(self) -> Report:
        """Sites, kernels, density, MACs before and after, and why anything was left alone."""
        self.ensure_active("report")
        refresh(self)
        return report(self)

    def warmup(self, input: Any) -> Patch:
        """Run the model once so that kernels that compile do so now, not in a later forward pass.

        The model runs in the mode it is in, without gradients; while it trains on a GPU, backward
        passes of the kernels are compiled as well. Weights, buffers, planners and random numbers
        stay as they are.

        Args:
            input: What the model takes: images ``[B, C, H, W]``, a dict of keyword arguments or a
                tuple of positional ones, of the shape, type and device (and under the autocast) of
                later calls.

        Returns:
            The patch.

        >>> import torch, sparsiattn
        >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
        >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
        ...     patch.warmup(tiny_images(2)) is patch
        True
        """
        self.ensure_active("warmup")
        refresh(self)
        warmup(self, input)
        return self

    def source(self) -> torch.Tensor:
        """Where every original token is in the final sequence of the last eager forward pass.

        Every thread, and every task of an event loop, is told of its own passes.

        Returns:
            ``[B, N]`` (prefix tokens first, then patches in raster order) with positions in the
            final sequence: a merged or fused token has that of its cluster, a dropped one -1.

        Raises:
            InvalidOption: No token strategy shortens the sequence, or the model did not run yet in
                this thread, or task.
        """
        self.ensure_active("source")
        refresh(self)
        if not self.shortens:
            raise InvalidOption(
                "source() needs a token strategy that makes the sequence shorter; here every token "
                "stays in its place"
            )
        if len({block.start for block in self.blocks}) > 1:
            raise InvalidOption(
                "source() speaks of one sequence, and this model has several towers: patch the "
                "one of interest on its own, for example patch(model.left)"
            )
        if self.last_pass is None:
            raise InvalidOption(
                "source() speaks of the last forward pass of this thread, or task: run the model "
                "first (eagerly, and not disabled: compiled graphs and copies keep no record)"
            )
        return source(*self.last_pass)

    def call_needs_all(self, args: Any, kwargs: Any) -> bool:
        return call_needs_all(self, args, kwargs)

    def monitor(
        self,
        every: int = 100,
        *,
        bound: float | None = None,
        on_low: OnLow = "warn",
        sites: Sites | None = None,
        rows: int = 8,
    ) -> Monitor:
        """Watch in use how much of exact attention the kept keys hold.

        On the first forward call of the model and every ``every``-th after it, a few query rows of
        every watched site are computed exactly: the softmax over all keys that the host allows, and
        its sum over those that the pattern keeps one by one, a mean over rows and heads by image.
        Summary keys (``background``) count apart, as the overlap: the sum over keys of the smaller
        of exact and patched attention, where a summary key's share is spread evenly over the
        dropped keys that it stands for. `report` shows all of it in a line.

        Calls of the model in eval mode count, in every thread; outputs stay as they are. Compiled
        and exported programs are not watched (run the model itself, or use
        ``torch.compiler.set_stance("force_eager")``), nor are copies, training, parts that are
        called alone, and queries that see every key, as class tokens do. Of several processes each
        watches its own calls.

        Args:
            every: Of so many calls one is watched.
            bound: A call is low where any image, at any site, has a mass below it; with summary
                keys, an overlap. None to watch only.
            on_low: ``"warn"`` for one `LowAttentionMass` warning; ``"dense"`` to run calls of the
                model dense as well, from the next one on, as `disabled` does, until
                `Monitor.resume` or `Monitor.close`.
            sites: Which of the patched sites, as `patch` takes them; all sparse ones if None.
            rows: Query rows of a site, of patches and evenly spaced; other ones in every call.

        Returns:
            The running watch, also `active_monitor`; it can be closed, or be used with ``with``.

        Raises:
            InvalidOption: An option is out of range, no such site keeps some of its keys, or the
                patch is watched already.

        >>> import torch, sparsiattn
        >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
        >>> patch = sparsiattn.patch(tiny_vit(), "topk", k=0.25)
        >>> with patch.monitor(every=2) as monitor, torch.no_grad():
        ...     for _ in range(4):
        ...         outputs = patch.model(tiny_images(2))
        >>> found = monitor.report()
        >>> found.calls, found.watched, 0.25 < found.lowest < 1
        (4, 2, True)
        """
        self.ensure_active("monitor")
        refresh(self)
        check_options(every, rows, bound, on_low)
        if self.active_monitor is not None:
            raise InvalidOption("this patch is watched already: close active_monitor first")
        names = watchable(self, sites)
        monitor = self.active_monitor = Monitor(self, names, every, rows, bound, on_low)
        return monitor

    def save(self, directory: str | PathLike[str], *, include_model: bool = False) -> Path:
        """Write a JSON config and the planners' weights as safetensors.

        A kill on the way leaves what was there before, or what is saved now.

        Args:
            directory: Where to.
            include_model: Also the host's own weights: a whole checkpoint, from which
                `sparsiattn.from_pretrained` makes model and patch. ``model.safetensors`` has the
                host's own names and loads without this library, too.

        Returns:
            The directory.
        """
        self.ensure_active("save")
        refresh(self)
        return save(self, Path(directory), include_model=include_model)

    def merge_and_export(self, directory: str | PathLike[str]) -> Path:
        """The old name of ``save(directory, include_model=True)``."""
        warn_renamed("Patch.merge_and_export(directory)", "save(directory, include_model=True)")
        return self.save(directory, include_model=True)

    left = renamed_property("left", "skipped")
    found = renamed_property("found", "model_sites")
    learns = renamed_property("learns", "has_learned_planners")

    def push_to_hub(self, repo_id: str, *, whole: bool = False, **options: Any) -> str:
        """Upload what `save` writes as a repository of the Hugging Face Hub.

        Args:
            repo_id: ``user/name``.
            whole: With ``include_model=True``.
            **options: See `sparsiattn.serialization.hub.push`.

        Returns:
            Its address.
        """
        self.ensure_active("push_to_hub")
        refresh(self)
        return hub.push(self, repo_id, whole=whole, **options)

    def __repr__(self) -> str:
        state = "" if self.active else " (undone)"
        note = f": {self.speed_note}" if self.active and self.speed_note else ""
        return f"<Patch{state}: {self.title}, kernel={self.kernel!r}{note}>"


def patch_of(model: nn.Module) -> Patch | None:
    """The live patch of a model (or of its copy, or after unpickling), None if there is none.

    >>> patch_of(torch.nn.Linear(1, 1)) is None
    True
    """
    return cast("Patch | None", state_of(model))


def unpatch(model: nn.Module) -> nn.Module:
    """Undo the model's patch, if it has one; returns the model.

    A copy of a part of a patched model carries a copy of the patch, which is undone as well.

    >>> unpatch(torch.nn.Linear(1, 1))
    Linear(in_features=1, out_features=1, bias=True)
    """
    patch = patch_of(model)
    if patch is not None:
        patch.unpatch()
    parts = set(unwrap(model).modules())
    for _, inner in list(live_patches(unwrap(model))):
        if inner.is_copy and inner.model not in parts:
            inner.unpatch()
    return model
