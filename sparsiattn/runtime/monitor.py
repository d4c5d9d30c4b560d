"""`Monitor`: measures, while a model is in use, how much of exact attention the kept keys hold.

`EnterModel` and `LeaveModel` (`restore.py`) report forward passes, `SiteRuntime.sparse` reports
attention calls.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import ComputedPattern, Dense, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, LowAttentionMass
from sparsiattn.runtime import attention_rows, settings
from sparsiattn.runtime.hook_tools import is_functorch
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.sdpa_intercept import forget_compiled

OnLow = Literal["warn", "dense"]
ON_LOW = ("warn", "dense")

KEPT = 10_000
"""Number of latest figures, one per image and site, that the median is computed from."""
_STEP = (5**0.5 - 1) / 2  # golden ratio: rows of later calls fall between those of earlier calls


@dataclass(frozen=True)
class MonitorReport:
    """The results of a `Monitor`. Masses are shares of exact attention, from 0 to 1.

    Attributes:
        every: One call in this many is watched.
        rows: Number of query rows that are measured per site.
        sites: Number of watched sites.
        bound: Lowest share that is accepted, see `Monitor`; None for no bound.
        on_low: Reaction to a call below the bound, ``"warn"`` or ``"dense"``.
        calls: Number of calls of the model in eval mode since the monitor started.
        watched: Number of calls in which the mass was measured.
        below: Number of watched calls in which an image was below the bound at some site.
        lowest: Lowest mass of an image at a site; None before the first watched call.
        lowest_site: Name of the site with the lowest share, summary keys included; None before the
            first watched call.
        median: Median mass over the last 10,000 pairs of an image and a site; None before the first
            watched call.
        lowest_overlap: As ``lowest``, including summary keys; None without summary keys.
        median_overlap: As ``median``, including summary keys; None without summary keys.
        is_dense: Whether calls run dense now.
        dense_calls: Number of calls that ran dense because of the bound.
    """

    every: int
    rows: int
    sites: int
    bound: float | None
    on_low: str
    calls: int
    watched: int
    below: int
    lowest: float | None
    lowest_site: str | None
    median: float | None
    lowest_overlap: float | None
    median_overlap: float | None
    is_dense: bool
    dense_calls: int

    def __str__(self) -> str:
        watched = f"monitor: {self.watched:,} of {self.calls:,} calls watched"
        if self.lowest is None or self.median is None:
            note = (
                "nothing measured yet; only eager calls of the model in eval mode are watched, not "
                "compiled or exported programs"
            )
            return f"{watched} ({note})"
        parts = [
            f"{watched} (1 in {self.every:,}, {self.rows} rows of {self.sites} sites): kept keys "
            f"hold at least {self.lowest:.3f} of exact attention, median {self.median:.3f}"
        ]
        if self.lowest_overlap is not None and self.median_overlap is not None:
            parts.append(
                f"with summary keys at least {self.lowest_overlap:.3f}, median "
                f"{self.median_overlap:.3f}"
            )
        parts.append(f"lowest at {self.lowest_site}")
        if self.bound is not None:
            parts.append(f"calls below {self.bound:g}: {self.below:,}")
        if self.dense_calls:
            parts.append(f"calls that ran dense: {self.dense_calls:,}")
        if self.is_dense:
            parts.append("dense now: active_monitor.resume() makes the patch sparse again")
        return "; ".join(parts)

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__


class Monitor:
    """A running monitor of a patch; see `Patch.monitor`. As a context manager it closes on exit.

    Attributes:
        owner: The patch.
        sites: Names of the watched sites.
        every: One call in this many is watched, starting with the first.
        rows: Number of query rows that are measured per site.
        bound: Lowest share of exact attention that is accepted: of the overlap if a pattern has
            summary keys, else of the mass; None for no bound.
        on_low: Reaction to a call below the bound, ``"warn"`` or ``"dense"``.
        is_dense: Whether the patch runs dense because a call was below the bound.
        closed: Whether the monitor was closed.
    """

    def __init__(
        self,
        owner: PatchOwner,
        sites: Collection[str],
        every: int,
        rows: int,
        bound: float | None,
        on_low: OnLow,
    ) -> None:
        self.owner, self.sites = owner, frozenset(sites)
        self.every, self.rows, self.bound, self.on_low = every, rows, bound, on_low
        self.is_dense = self.closed = self._warned = False
        self._calls = self._watched = self._below = self._dense_calls = 0
        self._held: tuple[float, str] | None = None
        self._lowest: float | None = None
        self._lowest_overlap: float | None = None
        self._masses: deque[float] = deque(maxlen=KEPT)
        self._overlaps: deque[float] = deque(maxlen=KEPT)
        self._lock = threading.RLock()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Monitor{' (closed)' if self.closed else ''}: {self.report()}>"

    def report(self) -> MonitorReport:
        """The results so far; also available after `close`."""
        with self._lock:
            masses, overlaps = list(self._masses), list(self._overlaps)
            return MonitorReport(
                every=self.every,
                rows=self.rows,
                sites=len(self.sites),
                bound=self.bound,
                on_low=self.on_low,
                calls=self._calls,
                watched=self._watched,
                below=self._below,
                lowest=self._lowest,
                lowest_site=None if self._held is None else self._held[1],
                median=median(masses) if masses else None,
                lowest_overlap=self._lowest_overlap,
                median_overlap=median(overlaps) if overlaps else None,
                is_dense=self.is_dense,
                dense_calls=self._dense_calls,
            )

    def resume(self) -> None:
        """Make the patch sparse again from the next call on; the next low call warns again."""
        with self._lock:
            was_dense, self.is_dense, self._warned = self.is_dense, False, False
            self.owner.went_dense = False
        if was_dense:
            forget_compiled()

    def close(self) -> None:
        """Stop watching. A patch that went dense is sparse again. Calling it twice is allowed."""
        if not self.closed:
            self.closed = True
            self.resume()
        if self.owner.active_monitor is self:
            self.owner.active_monitor = None

    def begin(self) -> Any:
        """Start a pass of the model; returns the setting in effect during the pass, or None."""
        with self._lock:
            number = self._calls
            self._calls += 1
            if self.is_dense:
                self._dense_calls += 1
                return settings.begin("disabled", self.owner.key)
        if number % self.every or not _can_measure():
            return None
        return settings.begin("watched", WatchedPass(self, number // self.every))

    def take(self, watched: WatchedPass) -> None:
        """Add the figures of a pass, and react if they are below the bound."""
        figures = watched.figures()
        if not figures or self.closed:
            return
        held, name = min((m if o is None else o, name) for name, m, o in figures)
        masses = [mass for _, mass, _ in figures]
        overlaps = [overlap for _, _, overlap in figures if overlap is not None]
        with self._lock:
            self._watched += 1
            self._masses += masses
            self._overlaps += overlaps
            self._held = min(self._held or (held, name), (held, name))
            self._lowest = min([*masses, *_known(self._lowest)])
            self._lowest_overlap = min([*overlaps, *_known(self._lowest_overlap)], default=None)
            if self.bound is None or held >= self.bound:
                return
            self._below += 1
            first, self._warned = not self._warned, True
            goes_dense = self.on_low == "dense" and not self.is_dense
            if goes_dense:
                self.is_dense = self.owner.went_dense = True
        if goes_dense:
            forget_compiled()
        if first:
            self._warn(held, name)

    def _warn(self, held: float, name: str) -> None:
        finding = (
            f"at site {name!r} the kept keys, summary keys included, hold {held:.3f} of exact "
            f"attention for an image, below bound={self.bound:g}"
        )
        reaction = "this warning is shown once, patch.report() counts further calls"
        if self.on_low == "dense":
            reaction = (
                "the patch runs dense from the next call on; patch.active_monitor.resume() makes "
                "it sparse again, close() does too and stops watching"
            )
        warnings.warn(f"{finding}: {reaction}", LowAttentionMass, stacklevel=2)


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


def check_options(every: Any, rows: Any, bound: Any, on_low: Any) -> None:
    """Raise `InvalidOption` for options of `Patch.monitor` that are out of range."""
    for name, value in (("every", every), ("rows", rows)):
        if type(value) is not int or value < 1:
            raise InvalidOption(f"{name} must be an int >= 1, got {value!r}")
    is_number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
    if bound is not None and not (is_number and 0 < bound <= 1):
        raise InvalidOption(f"bound must be above 0 and at most 1, or None, got {bound!r}")
    if on_low not in ON_LOW:
        raise InvalidOption(f"on_low must be 'warn' or 'dense', got {on_low!r}")
    if on_low == "dense" and bound is None:
        raise InvalidOption("on_low='dense' needs a bound: pass bound=, a share of attention")


def enter(owner: PatchOwner, *, training: bool) -> None:
    """Start a pass of the model in this thread.

    Passes in training mode are not watched, nor are those made for `show`, `profile` and `warmup`
    or with the patch disabled.
    """
    leave(owner, finished=False)  # a pass that an interrupt left open
    monitor: Monitor | None = owner.active_monitor  # another thread may close it at any time
    if monitor is None or training or owner.is_examined or owner.key in settings.disabled:
        return
    setting = monitor.begin()
    if setting is not None:
        owner.monitored[get_ident()] = monitor, setting


def leave(owner: PatchOwner, *, finished: bool) -> None:
    """End a pass of the model in this thread."""
    monitor, setting = owner.monitored.pop(get_ident(), (None, None))
    if monitor is None:
        return
    settings.end(setting)
    if finished and isinstance(setting.value, WatchedPass):
        monitor.take(setting.value)


def _can_measure() -> bool:
    """Whether neither tracing nor the capture of a CUDA graph is in progress."""
    if torch._C._get_tracing_state() is not None:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class WatchedPass:
    """One pass whose attention is measured.

    Attributes:
        monitor: The patch's monitor.
        number: Number of passes that were watched before.
    """

    def __init__(self, monitor: Monitor, number: int) -> None:
        self.monitor, self.number = monitor, number
        self._measured: list[tuple[str, Tensor, Tensor | None]] = []

    def measure(self, owner: PatchOwner, inputs: AttentionInputs, pattern: Pattern) -> None:
        """Measure some rows of a call, without synchronising with the device."""
        site, q = inputs.site, inputs.q
        if owner is not self.monitor.owner or site.name not in self.monitor.sites:
            return
        if isinstance(pattern, (Dense, ComputedPattern)):
            return
        if type(q) is not Tensor or q.is_meta or is_functorch(q):
            return
        rows = self._rows(inputs)
        if not len(rows) or not len(q):
            return
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            part = attention_rows.compute(attention_rows.in_float32(inputs), pattern, rows)
            alive = part.allowed.any(-1).expand(part.exact.shape[:-1])
            mass = _by_image(part.mass(), alive, site)
            overlap = None if part.cells is None else _by_image(part.overlap(), alive, site)
        self._measured.append((site.name, mass, overlap))

    def figures(self) -> list[tuple[str, float, float | None]]:
        """Site, mass and overlap of every measured image, copied from the device at once."""
        if not self._measured:
            return []
        parts = [x for _, mass, overlap in self._measured for x in (mass, overlap) if x is not None]
        # NaN counts as no mass
        values = iter(torch.cat([part.cpu() for part in parts]).nan_to_num(0.0).tolist())
        figures = []
        for name, mass, overlap in self._measured:
            masses = [next(values) for _ in range(len(mass))]
            overlaps = [None if overlap is None else next(values) for _ in masses]
            figures += list(zip([name] * len(masses), masses, overlaps, strict=True))
        return figures

    def _rows(self, inputs: AttentionInputs) -> Tensor:
        """Indices of evenly spaced patch queries; different ones in every watched call."""
        first, count = inputs.prefix, inputs.n_queries - inputs.prefix
        wanted = min(self.monitor.rows, count)
        start = int(self.number * _STEP % 1 * count)
        rows = sorted(first + (start + i * count // wanted) % count for i in range(wanted))
        return torch.tensor(rows, dtype=torch.int64, device=inputs.q.device)


def _by_image(values: Tensor, alive: Tensor, site: Site) -> Tensor:
    """Means of ``[B * windows, H, R]`` over heads, rows, and the windows of an image: ``[B]``.

    Rows for which the host masks every key do not count.
    """
    total, count = (values * alive).flatten(1).sum(1), alive.flatten(1).sum(1)
    if site.windows > 1 and len(total) % site.windows == 0:
        total, count = (x.view(-1, site.windows).sum(1) for x in (total, count))
    # an image in which every key is masked loses nothing
    return torch.where(count > 0, total / count.clamp_min(1), 1.0)
