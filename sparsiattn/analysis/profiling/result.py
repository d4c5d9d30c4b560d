"""What `profile` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sparsiattn.analysis.profiling.accounting import Accounting


@dataclass(frozen=True)
class Parts:
    """Multiply-accumulates for one image. mhsa: QK^T and AV. predictor: choosing keys and tokens.
    projections: the rest of attention modules. mlp: the rest of the blocks around them. rest:
    patches, head, all else."""

    mhsa: int = 0
    predictor: int = 0
    projections: int = 0
    mlp: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class SiteProfile:
    """One site. tokens: those of the image that enter its attention, of all windows; tokens_dense:
    without the patch. density: kept (query, key) pairs over those there are at these tokens. dense,
    own, computed, paper: MACs for one image, see `Profile`; where several sites share a block or
    its projections, the first has them. expected, measured: speed relative to dense attention with
    planning paid, as in `Report`; None where attention stays the host's own, or was not measured.
    left_dense: whether that is so because the sparse kernel should lose (`only_if_faster`).
    """

    name: str
    strategy: str
    kernel: str
    tokens: int
    tokens_dense: int
    windows: int
    density: float
    dense: Parts
    own: Parts
    computed: Parts
    paper: Parts
    left_dense: bool = False
    expected: float | None = None
    measured: float | None = None

    @property
    def speed(self) -> float | None:
        """The best known speed relative to dense attention: measured, else expected."""
        return self.expected if self.measured is None else self.measured


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass, medians of paired runs with quartiles; ratio: dense over
    patched. The last three are None for an unpatched model."""

    rounds: int
    dense_ms: float
    dense_quartiles: tuple[float, float]
    ms: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that tensors of one forward pass take at its peak, weights and inputs not counted."""

    dense: int
    patched: int


@dataclass(frozen=True)
class Profile:
    """What one forward pass costs, dense and patched. ``print`` it, or take `to_dict`.

    All figures are MACs (multiply-accumulates) for one image; FLOPs are twice that. dense: of the
    same model unpatched. own, computed, paper: of the patched one by three accountings. *own*
    counts the pairs that patterns keep and all that choosing costs, *computed* also what kernels
    add (padding, pairs computed only to be masked), *paper* follows Sparsifiner's tables, whose
    MHSA includes the predictor. accounting: the one that ``macs``, ``mhsa_macs`` and
    ``predictor_macs`` speak of. sites: each alone. latency, memory: as measured, where asked for.
    backbone, input_shape: what was counted. strategy: empty for an unpatched model, whose
    accountings all agree. images: of the batch that was counted. notes: where a saving in MACs is
    none in time.
    """

    model: str
    backbone: str
    strategy: str
    input_shape: tuple[int, ...]
    images: int
    accounting: Accounting
    dense: Parts
    own: Parts
    computed: Parts
    paper: Parts
    sites: tuple[SiteProfile, ...]
    latency: Latency | None = None
    memory: Memory | None = None
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Parts:
        """The parts by `accounting`."""
        return getattr(self, self.accounting)  # type: ignore[no-any-return]

    @property
    def macs_dense(self) -> int:
        return self.dense.total

    @property
    def macs(self) -> int:
        return self.chosen.total

    @property
    def flops_dense(self) -> int:
        return 2 * self.macs_dense

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def mhsa_macs_dense(self) -> int:
        return self.dense.mhsa

    @property
    def mhsa_macs(self) -> int:
        """QK^T and AV; by the paper's accounting with the predictor, as in its tables."""
        extra = self.chosen.predictor if self.accounting == "paper" else 0
        return self.chosen.mhsa + extra

    @property
    def predictor_macs(self) -> int:
        return self.chosen.predictor

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the image that enter the attention of each site, in the order they run."""
        return tuple(site.tokens for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = (
            *("macs_dense", "macs", "flops_dense", "flops", "mhsa_macs_dense", "mhsa_macs"),
            *("predictor_macs", "tokens"),
        )
        return {**{name: getattr(self, name) for name in names}, **asdict(self)}

    def __str__(self) -> str:
        from sparsiattn.analysis.profiling.text import text

        return text(self)
