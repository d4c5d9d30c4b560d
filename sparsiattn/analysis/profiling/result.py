"""`Profile`: the result of `profile`, and its text form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from sparsiattn.analysis.profiling.accounting import Accounting
from sparsiattn.errors import renamed_property
from sparsiattn.patching.text import Row, macs_text, plain, plain_data, shape_text, speed_text


@dataclass(frozen=True)
class Parts:
    """Multiply-accumulates (MACs) for one image, by part.

    Attributes:
        mhsa: QK^T and AV.
        predictor: Selection of keys and tokens.
        projections: The rest of attention modules.
        mlp: The rest of their blocks.
        rest: Patch embedding, head and everything else.
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
"""Labels of parts in tables that differ from the name of the field."""


@dataclass(frozen=True)
class SiteProfile:
    """The costs of one site. If sites share a block or projections, the first has their MACs.

    Attributes:
        name: Path of the site.
        strategy: Name of its strategy; empty without a patch.
        kernel: Kernels that ran; ``"dense"`` for the host's own attention.
        tokens: Number of tokens of an image that enter its attention, in all windows.
        tokens_dense: The same without the patch.
        windows: Number of windows per image.
        density: Share of kept (query, key) pairs among all pairs of these tokens.
        dense: MACs for one image without the patch.
        pattern: MACs for one image by the accounting ``"own"``, see `Profile`.
        computed: MACs for one image by the accounting ``"computed"``.
        paper: MACs for one image by the accounting ``"paper"``.
        left_dense: Whether it stays dense because the sparse kernel is expected to be slower
            (``only_if_faster``).
        expected: Expected speed relative to dense attention, planning included, as in `Report`;
            None if the host's own attention runs.
        measured: Measured speed; None if not measured.
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
"""Columns of the table of sites; the first three are shown without a patch."""


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass in paired runs.

    Attributes:
        rounds: Number of paired runs.
        dense_ms: Median time of the unpatched model, in milliseconds.
        dense_quartiles: First and third quartile of that time.
        ms: Median time of the patched model, in milliseconds; None without a patch.
        quartiles: First and third quartile of that time; None without a patch.
        ratio: Dense time divided by patched time; None without a patch.
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
    """Peak memory of a forward pass in bytes, without weights and inputs.

    Attributes:
        dense: Peak memory of the unpatched model.
        patched: Peak memory of the patched model; equal to ``dense`` without a patch.
    """

    dense: int
    patched: int


@dataclass(frozen=True)
class Profile:
    """The costs of one forward pass, dense and patched. Print it, or use `to_dict`.

    All figures are MACs (multiply-accumulates) for one image; FLOPs are twice that. The patched
    model is counted by three rules, which agree without a patch.

    Attributes:
        model: Class name of the model.
        backbone: Name of the adapter for the model.
        strategy: Names of the strategies; empty without a patch.
        input_shape: Shape of the batch that was counted.
        images: Number of images in that batch.
        accounting: Accounting rule of ``macs``, ``mhsa_macs`` and ``predictor_macs``.
        dense: The unpatched model.
        pattern: By the rule ``"own"``: pairs that patterns keep, and the cost of selection.
        computed: By the rule ``"computed"``: also pairs that kernels add (padding, masked pairs).
        paper: By the rule ``"paper"``: as in Sparsifiner's tables, whose MHSA includes the
            predictor.
        sites: The costs of each site.
        latency: Time; None if not requested.
        memory: Peak memory; None if not requested.
        notes: Explanations of where fewer MACs do not save time.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> cost = sparsiattn.profile(tiny_vit(), tiny_images(1))
    >>> cost.tokens, cost.flops == 2 * cost.macs, cost.macs == cost.macs_dense
    ((65, 65), True, True)
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
        """The MACs by part, by the rule `accounting`."""
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
        """MACs of QK^T and AV of the unpatched model."""
        return self.dense.mhsa

    @property
    def mhsa_macs(self) -> int:
        """MACs of QK^T and AV; by the rule ``"paper"`` also of the predictor, as in its tables."""
        return self.chosen.mhsa + (self.predictor_macs if self.accounting == "paper" else 0)

    @property
    def predictor_macs(self) -> int:
        """MACs of selecting keys and tokens."""
        return self.chosen.predictor

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of an image that enter the attention of each site, in order."""
        return tuple(site.tokens for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, in which ``pattern`` is called ``own``."""
        names = (
            *("macs_dense", "macs", "flops_dense", "flops", "mhsa_macs_dense", "mhsa_macs"),
            *("predictor_macs", "tokens"),
        )
        return {name: getattr(self, name) for name in names} | plain_data(self, pattern="own")

    def __str__(self) -> str:
        return plain(self.layout())

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def layout(self) -> list[str | list[Row]]:
        """Lines and tables from top to bottom; an empty line separates the two tables."""
        return [self._head(), self.parts_table(), "", self.site_table(), *self._tail()]

    def _head(self) -> str:
        return (
            f"{self.model} ({self.backbone}), {self.strategy or 'unpatched'}, {len(self.sites)} "
            f"sites, input {shape_text(self.input_shape)}: MACs for one image (FLOPs are twice "
            f"that), {macs_text(self.macs_dense)} -> {macs_text(self.macs)} by the accounting "
            f"{self.accounting!r}"
        )

    def parts_table(self) -> list[Row]:
        """Rows of the table of MACs by part, dense and by each rule, header first."""
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
        """Rows of the table of sites, header first; columns without information are left out."""
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
                "peak memory of a forward pass without weights: "
                f"dense {self.memory.dense / 1e6:.1f} MB{patched}"
            )
        return [*lines, *self.notes]
