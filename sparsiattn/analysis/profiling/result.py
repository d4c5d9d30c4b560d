"""What `profile` returns, and how it is laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from sparsiattn.analysis.profiling.accounting import Accounting
from sparsiattn.errors import renamed_property
from sparsiattn.patching.text import Row, macs_text, plain, plain_data, shape_text, speed_text


@dataclass(frozen=True)
class Parts:
    """Multiply-accumulates for one image.

    Attributes:
        mhsa: QK^T and AV.
        predictor: Choosing keys and tokens.
        projections: The rest of attention modules.
        mlp: The rest of the blocks around them.
        rest: Patches, head, all else.
    """

    mhsa: int = 0
    predictor: int = 0
    projections: int = 0
    mlp: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        """MACs of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


LABELS = {"mhsa": "MHSA (QK^T, AV)", "mlp": "MLP"}
"""What tables call parts, where that is not the name of the field."""


@dataclass(frozen=True)
class SiteProfile:
    """One site. Where several share a block or its projections, the first of them has its MACs.

    Attributes:
        name: Path of the site.
        strategy: Name of its strategy, empty without a patch.
        kernel: Kernels that ran, ``"dense"`` for the host's own attention.
        tokens: Tokens of the image that enter its attention, in all windows.
        tokens_dense: The same without the patch.
        windows: Windows of one image.
        density: Kept (query, key) pairs over those there are at these tokens.
        dense: MACs for one image without the patch.
        pattern: MACs for one image by the accounting ``"own"``, see `Profile`.
        computed: MACs for one image by the accounting ``"computed"``.
        paper: MACs for one image by the accounting ``"paper"``.
        left_dense: Whether it stays dense because the sparse kernel should lose
            (``only_if_faster``).
        expected: Speed relative to dense attention with planning counted, as in `Report`; None
            where attention stays the host's own.
        measured: The same, measured; None where it was not.
    """

    name: str
    strategy: str
    kernel: str
    tokens: int
    tokens_dense: int
    windows: int
    density: float
    dense: Parts
    pattern: Parts
    computed: Parts
    paper: Parts
    left_dense: bool = False
    expected: float | None = None
    measured: float | None = None

    own = renamed_property("own", "pattern")

    @property
    def speed(self) -> float | None:
        """The best known speed relative to dense attention: measured, else expected."""
        return self.expected if self.measured is None else self.measured


SITE_COLUMNS: dict[str, Callable[[SiteProfile], str]] = {
    "site": lambda site: site.name,
    "tokens": lambda site: str(site.tokens),
    "MHSA": lambda site: macs_text(site.dense.mhsa),
    "kernel": lambda site: site.kernel,
    "density": lambda site: f"{site.density:.3f}",
    "kept": lambda site: macs_text(site.pattern.mhsa),
    "computed": lambda site: macs_text(site.computed.mhsa),
    "predictor": lambda site: macs_text(site.pattern.predictor),
    "expected": lambda site: speed_text(site.expected if site.speed else None),
    "measured": lambda site: speed_text(site.measured if site.speed else None),
}
"""Columns of the table of sites; the first three say what there is without a patch."""


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass in paired runs.

    Attributes:
        rounds: Paired runs.
        dense_ms: Median milliseconds of the unpatched model.
        dense_quartiles: First and third quartile of those.
        ms: Median milliseconds of the patched model; None without a patch.
        quartiles: First and third quartile of those; None without a patch.
        ratio: Dense time over patched time; None without a patch.
    """

    rounds: int
    dense_ms: float
    dense_quartiles: tuple[float, float]
    ms: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None

    def __str__(self) -> str:
        dense = f"one forward pass: dense {self.dense_ms:.2f} ms"
        if self.ms is None:
            return dense
        speed = f"{speed_text(self.ratio)} (median of {self.rounds} rounds)"
        return f"{dense}, patched {self.ms:.2f} ms, {speed}"


@dataclass(frozen=True)
class Memory:
    """Bytes of a forward pass at its peak, weights and inputs not counted.

    Attributes:
        dense: Of the unpatched model.
        patched: Of the patched model; the same without a patch.
    """

    dense: int
    patched: int


@dataclass(frozen=True)
class Profile:
    """What one forward pass costs, dense and patched. ``print`` it, or take `to_dict`.

    All figures are MACs (multiply-accumulates) for one image; FLOPs are twice that. The patched
    model is counted in three ways, which agree without a patch.

    Attributes:
        model: Class of the model.
        backbone: The adapter that knows the model.
        strategy: Names of the strategies, empty without a patch.
        input_shape: Shape of the batch that was counted.
        images: Images in that batch.
        accounting: The way in which ``macs``, ``mhsa_macs`` and ``predictor_macs`` are counted.
        dense: The same model unpatched.
        pattern: By the accounting ``"own"``: pairs that patterns keep, and all that choosing costs.
        computed: By ``"computed"``: also what kernels add (padding, pairs computed to be masked).
        paper: By ``"paper"``: as in Sparsifiner's tables, whose MHSA includes the predictor.
        sites: Each site alone.
        latency: Time, if it was asked for.
        memory: Peak memory, if it was asked for.
        notes: Where a saving in MACs is none in time.
    """

    model: str
    backbone: str
    strategy: str
    input_shape: tuple[int, ...]
    images: int
    accounting: Accounting
    dense: Parts
    pattern: Parts
    computed: Parts
    paper: Parts
    sites: tuple[SiteProfile, ...]
    latency: Latency | None = None
    memory: Memory | None = None
    notes: tuple[str, ...] = ()

    own = renamed_property("own", "pattern")

    @property
    def chosen(self) -> Parts:
        """The parts by `accounting`."""
        name = "pattern" if self.accounting == "own" else self.accounting
        return getattr(self, name)  # type: ignore[no-any-return]

    @property
    def macs_dense(self) -> int:
        """MACs of the unpatched model."""
        return self.dense.total

    @property
    def macs(self) -> int:
        """MACs of the patched model."""
        return self.chosen.total

    @property
    def flops_dense(self) -> int:
        """FLOPs of the unpatched model."""
        return 2 * self.macs_dense

    @property
    def flops(self) -> int:
        """FLOPs of the patched model."""
        return 2 * self.macs

    @property
    def mhsa_macs_dense(self) -> int:
        """QK^T and AV of the unpatched model."""
        return self.dense.mhsa

    @property
    def mhsa_macs(self) -> int:
        """QK^T and AV; by the paper's accounting with the predictor, as in its tables."""
        return self.chosen.mhsa + (self.predictor_macs if self.accounting == "paper" else 0)

    @property
    def predictor_macs(self) -> int:
        """MACs of choosing keys and tokens."""
        return self.chosen.predictor

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the image that enter the attention of each site, in the order they run."""
        return tuple(site.tokens for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, where ``pattern`` goes by its accounting, ``own``."""
        names = (
            *("macs_dense", "macs", "flops_dense", "flops", "mhsa_macs_dense", "mhsa_macs"),
            *("predictor_macs", "tokens"),
        )
        return {name: getattr(self, name) for name in names} | plain_data(self, pattern="own")

    def __str__(self) -> str:
        return plain(self.layout())

    def layout(self) -> list[str | list[Row]]:
        """Lines and tables, top down; an empty line parts the two tables."""
        return [self._head(), self.parts_table(), "", self.site_table(), *self._tail()]

    def _head(self) -> str:
        return (
            f"{self.model} ({self.backbone}), {self.strategy or 'unpatched'}, {len(self.sites)} "
            f"sites, input {shape_text(self.input_shape)}: MACs for one image (FLOPs are twice "
            f"that), {macs_text(self.macs_dense)} -> {macs_text(self.macs)} by the accounting "
            f"{self.accounting!r}"
        )

    def parts_table(self) -> list[Row]:
        """Cells of MACs by part, dense and by each accounting, a heading first."""
        paper = self.accounting == "paper"
        columns = {"dense": self.dense}
        if self.strategy:
            columns |= {"own": self.pattern, "computed": self.computed}
            columns |= {"paper": self.paper} if paper else {}
        rows = {
            LABELS.get(part.name, part.name): [getattr(x, part.name) for x in columns.values()]
            for part in fields(Parts)
        }
        if paper:
            both = [parts.mhsa + parts.predictor for parts in columns.values()]
            rows["MHSA with predictor"] = both
        rows["all"] = [parts.total for parts in columns.values()]
        return [
            ("MACs", *columns),
            *((label, *map(macs_text, macs)) for label, macs in rows.items()),
        ]

    def site_table(self) -> list[Row]:
        """Cells of the sites, a heading first; columns that would say nothing are left out."""
        if not self.sites:
            return []
        columns = list(SITE_COLUMNS)[: None if self.strategy else 3]
        cells = {name: [SITE_COLUMNS[name](site) for site in self.sites] for name in columns}
        told = {name: column for name, column in cells.items() if set(column) != {"-"}}
        return [tuple(told), *zip(*told.values(), strict=True)]

    def _tail(self) -> list[str]:
        lines = [] if self.latency is None else [str(self.latency)]
        if self.memory is not None:
            patched = f", patched {self.memory.patched / 1e6:.1f} MB" if self.strategy else ""
            lines.append(
                "peak memory of a forward pass, weights apart: "
                f"dense {self.memory.dense / 1e6:.1f} MB{patched}"
            )
        return [*lines, *self.notes]
