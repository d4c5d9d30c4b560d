"""What a search chooses from, and what a choice costs as far as sums can tell."""

from __future__ import annotations

from dataclasses import dataclass

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import parts_of
from sparsiattn.patching.handle import Patch
from sparsiattn.strategies.config import Config

KEYS = (1.0, 0.5, 0.25, 0.1, 0.05)
TOKENS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Gene:
    """One thing to choose: the share of keys at a site, or of tokens at a block.

    name: of the site or block. kind: ``"k"`` or ``"keep"``. depth: place in the order
    of execution; tokens that leave at a block are gone for all that comes after. shares: to choose
    from, 1 first.
    """

    name: str
    kind: str
    depth: float
    shares: tuple[float, ...]


Choice = tuple[float, ...]
"""A share for every gene."""


@dataclass(frozen=True)
class Space:
    """The genes of one patched model in the order of execution, and its MACs, dense, per image."""

    genes: tuple[Gene, ...]
    macs: int

    @property
    def dense(self) -> Choice:
        return (1.0,) * len(self.genes)

    def uniform(self, keys: float, tokens: float, drops: tuple[int, ...]) -> Choice:
        """The same share at every site, and at the genes ``drops`` among those of tokens."""
        return tuple(
            keys if gene.kind == "k" else (tokens if i in drops else 1.0)
            for i, gene in enumerate(self.genes)
        )

    def schedule(self, choice: Choice) -> dict[str, dict[str, float]]:
        """As `patch` takes it."""
        found: dict[str, dict[str, float]] = {}
        for gene, share in zip(self.genes, choice, strict=True):
            if gene.kind == "k" or share < 1.0:
                found.setdefault(gene.kind, {})[gene.name] = share
        for gene in self.genes:  # at least one block must be named
            found.setdefault(gene.kind, {gene.name: 1.0})
        return found


def space_of(live: Patch, keys: tuple[float, ...], tokens: tuple[float, ...]) -> Space:
    """The space of a live patch that reduces tokens, if it does, at its first block."""
    report = live.report()
    if report.macs is None:
        raise InvalidOption(
            f"{live.strategy.name!r} with these options decides per image how much it keeps, so a "
            "schedule has no fixed cost: search() needs shares, e.g. keep=0.7 instead of 'adaptive'"
        )
    names = [runtime.site.name for runtime in live.runtimes]
    places = {name: float(i) for i, name in enumerate(names)}
    places |= {name: float(b.index) for b in live.blocks for name in b.block.sites}
    kinds = kinds_of(live.strategy)
    genes = [Gene(name, "k", places[name], keys) for name in names if "k" in kinds]
    genes += [
        # between attention and MLP
        Gene(b.block.name, "keep", b.index + 0.5, tokens)
        for b in live.blocks
        if "keep" in kinds
    ]
    return Space(tuple(sorted(genes, key=lambda gene: gene.depth)), report.macs_dense)


def kinds_of(strategy: Config) -> list[str]:
    """What a schedule of this strategy sets: ``k`` per site, ``keep`` per block.

    Raises `InvalidOption` where that is neither.
    """
    attention, tokens = parts_of(strategy)
    found = ["k"] if "k" in attention.option_names() else []
    if tokens is not None and "keep" in tokens.per_layer:
        found.append("keep")
    if not found or (tokens is not None and "keep" not in found):
        raise InvalidOption(
            f"search() varies k per site and keep per block, and {strategy.name!r} has not both: "
            "search 'connectivity' or another attention strategy, 'token_drop', or 'hybrid'"
        )
    return found
