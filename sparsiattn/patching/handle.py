"""`Patch`: the handle that `patch` returns. It reports, saves and undoes the changes."""

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
    """An active patch of one model: `patch` returns it, and `patch_of` finds it again.

    Used as a context manager, it undoes itself on exit.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
    ...     patch.report().sites[0].density < 0.3
    True
    """

    def unpatch(self) -> nn.Module:
        """Undo the patch, so that the model is bit for bit what it was.

        A second call does nothing.

        Returns:
            The model.
        """
        if self.active:
            remove(self)
            forget_compiled()
        return self.model

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def report(self) -> Report:
        """Report sites, kernels, density, MACs before and after, and what was skipped and why."""
        self.ensure_active("report")
        refresh(self)
        return report(self)

    def warmup(self, input: Any) -> Patch:
        """Run the model once, so that kernels compile now and not in a later forward pass.

        The model runs in its current mode, without gradients. In training mode on a GPU, backward
        passes of the kernels are compiled, too. Weights, buffers, planners and the state of random
        number generators do not change.

        Args:
            input: Input of the model: images ``[B, C, H, W]``, a dict of keyword arguments or a
                tuple of positional ones. Shape, dtype, device and autocast mode should be those of
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
        """The position of every original token in the final sequence of the last forward pass.

        Only eager passes count, and each thread (and task of an event loop) sees its own passes.

        Returns:
            Positions in the final sequence, ``[B, N]``: prefix tokens first, then patches in raster
            order. A merged or fused token has the position of its cluster, a dropped one -1.

        Raises:
            InvalidOption: No token strategy shortens the sequence, or the model has not run yet in
                this thread or task.
        """
        self.ensure_active("source")
        refresh(self)
        if not self.shortens:
            raise InvalidOption(
                "source() needs a token strategy that makes the sequence shorter; here every token "
                "keeps its position"
            )
        if len({block.start for block in self.blocks}) > 1:
            raise InvalidOption(
                "source() describes one sequence, but this model has several towers: patch only "
                "one of them, for example patch(model.left)"
            )
        if self.last_pass is None:
            raise InvalidOption(
                "source() describes the last forward pass of this thread or task: run the model "
                "first (eagerly and not disabled; compiled graphs and copies keep no record)"
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
        """Monitor during inference how much of the exact attention falls on the kept keys.

        On the first forward call of the model and on every ``every``-th after it, a few query rows
        of every watched site are computed exactly: the softmax over all keys that the host allows.
        The *mass* is its sum over the keys that the pattern keeps, averaged over rows and heads for
        each image. If there are summary keys (``background``), the *overlap* is reported, too: the
        sum over keys of the smaller of exact and patched attention, where a summary key's share is
        spread evenly over the dropped keys that it stands for. `report` shows both in one line.

        Only calls of the model in eval mode are watched, in every thread; outputs do not change.
        Not watched are compiled and exported programs (run the model itself, or use
        ``torch.compiler.set_stance("force_eager")``), copies, training, parts that are called on
        their own, and queries that see every key, such as class tokens. Each process watches its
        own calls.

        Args:
            every: Watch one call out of this many.
            bound: A call is low if any image at any site has a mass (with summary keys, an overlap)
                below this value. None to watch without a bound.
            on_low: ``"warn"`` for one `LowAttentionMass` warning. ``"dense"`` to also run the
                following calls of the model dense, like `disabled`, until `Monitor.resume` or
                `Monitor.close`.
            sites: Which of the patched sites to watch, as in `patch`; None for all sparse ones.
            rows: Number of query rows per site: evenly spaced patches, different ones in each call.

        Returns:
            The running monitor, also available as `active_monitor`. Close it, or use it in a
            ``with`` statement.

        Raises:
            InvalidOption: An option is out of range, none of the sites drops any keys, or the patch
                has a monitor already.

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
            raise InvalidOption("this patch already has a monitor: close active_monitor first")
        names = watchable(self, sites)
        monitor = self.active_monitor = Monitor(self, names, every, rows, bound, on_low)
        return monitor

    def save(self, directory: str | PathLike[str], *, include_model: bool = False) -> Path:
        """Save the config as JSON and the planners' weights as safetensors.

        The write is atomic: after a kill, the folder holds either the old files or the new ones.

        Args:
            directory: The folder to write.
            include_model: Whether to save the model's own weights, too, so that
                `sparsiattn.from_pretrained` can create the model and patch it.
                ``model.safetensors`` uses the model's own parameter names and loads without this
                library.

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
        """Upload the files that `save` writes to a repository on the Hugging Face Hub.

        Args:
            repo_id: ``user/name``.
            whole: Whether to include the model's weights, as ``save(include_model=True)``.
            **options: See `sparsiattn.serialization.hub.push`.

        Returns:
            URL of the repository.
        """
        self.ensure_active("push_to_hub")
        refresh(self)
        return hub.push(self, repo_id, whole=whole, **options)

    def __repr__(self) -> str:
        state = "" if self.active else " (undone)"
        note = f": {self.speed_note}" if self.active and self.speed_note else ""
        title = self.title.replace(self.strategy.name, self.strategy.call_text(), 1)
        return f"<Patch{state}: {title}, kernel={self.kernel!r}{note}>"


def patch_of(model: nn.Module) -> Patch | None:
    """The active patch of a model, of its copy or after unpickling; None if there is none.

    >>> patch_of(torch.nn.Linear(1, 1)) is None
    True
    """
    return cast("Patch | None", state_of(model))


def unpatch(model: nn.Module) -> nn.Module:
    """Undo the model's patch, if it has one, and return the model.

    A copy of a part of a patched model has a copy of the patch, which is undone as well.

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
