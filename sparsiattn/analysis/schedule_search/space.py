"""What a search chooses from: a share of keys per site, a share of tokens per block."""

from __future__ import annotations

from dataclasses import dataclass

from sparsiattn.errors import InvalidOption
from sparsiattn.patching import Patch
from sparsiattn.patching.apply import parts_of
from sparsiattn.strategies import Config

KEYS = (1.0, 0.5, 0.25, 0.1, 0.05)
TOKENS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Gene:
    """One thing to choose: the share of keys at a site, or of tokens at a block.

    Attributes:
        name: Of the site or block.
        kind: ``"k"`` or ``"keep"``.
        depth: Place in the order of execution; tokens that leave at a block are gone for all that
            comes after.
        shares: To choose from, 1 first.
    """

    name: str
    kind: str
    depth: float
    shares: tuple[float, ...]


Choice = tuple[float, ...]
"""A share for every gene."""


@dataclass(frozen=True)
class Space:
    """What there is to choose in one patched model.

    Attributes:
        genes: In the order of execution.
        macs: MACs of the dense model per image.
    """

    genes: tuple[Gene, ...]
    macs: int

    @property
    def dense(self) -> Choice:
        """The choice that keeps all."""
        return (1.0,) * len(self.genes)

    def uniforms(self) -> dict[Choice, dict[str, float]]:
        """Choices of equal shares everywhere but the dense one, with these shares by kind.

        Tokens leave at a quarter, half and three quarters of the blocks.
        """
        blocks = [i for i, gene in enumerate(self.genes) if gene.kind == "keep"]
        drops = {blocks[len(blocks) * quarter // 4] for quarter in (1, 2, 3)} if blocks else set()
        shares = {gene.kind: gene.shares for gene in self.genes}
        choices: dict[Choice, dict[str, float]] = {}
        for k in shares.get("k", (1.0,)):
            for keep in shares.get("keep", (1.0,)):
                choice = tuple(
                    k if gene.kind == "k" else (keep if i in drops else 1.0)
                    for i, gene in enumerate(self.genes)
                )
                choices.setdefault(choice, {x: {"k": k, "keep": keep}[x] for x in shares})
        choices.pop(self.dense, None)
        return choices

    def schedule(self, choice: Choice) -> dict[str, dict[str, float]]:
        """A choice as `patch` takes it."""
        schedule: dict[str, dict[str, float]] = {}
        for gene, share in zip(self.genes, choice, strict=True):
            if gene.kind == "k" or share < 1.0:
                schedule.setdefault(gene.kind, {})[gene.name] = share
        for gene in self.genes:  # at least one block must be named
            schedule.setdefault(gene.kind, {gene.name: 1.0})
        return schedule


def space_of(patch: Patch, keys: tuple[float, ...], tokens: tuple[float, ...]) -> Space:
    """The space of a patched model.

    Args:
        patch: If it reduces tokens, then at its first block, so that it knows of all blocks.
        keys: Shares of keys to choose from.
        tokens: Shares of tokens to choose from.

    Raises:
        InvalidOption: The strategy has no fixed cost, or nothing that a schedule sets.
    """
    report = patch.report()
    if report.macs is None:
        raise InvalidOption(
            f"{patch.strategy.name!r} with these options decides per image how much it keeps, so a "
            "schedule has no fixed cost: search() needs shares, e.g. keep=0.7 instead of 'adaptive'"
        )
    depths = {runtime.site.name: float(i) for i, runtime in enumerate(patch.runtimes)}
    kinds, genes = kinds_of(patch.strategy), []
    for block in patch.blocks:
        depths |= dict.fromkeys(block.block.sites, float(block.index))
        if "keep" in kinds:  # tokens leave between attention and MLP
            genes.append(Gene(block.block.name, "keep", block.index + 0.5, tokens))
    if "k" in kinds:
        names = [runtime.site.name for runtime in patch.runtimes]
        genes = [Gene(name, "k", depths[name], keys) for name in names] + genes
    return Space(tuple(sorted(genes, key=lambda gene: gene.depth)), report.macs_dense)


def kinds_of(strategy: Config) -> list[str]:
    """What a schedule of this strategy sets: ``k`` per site, ``keep`` per block.

    Raises:
        InvalidOption: Neither, or tokens are reduced in another way.
    """
    attention, tokens = parts_of(strategy)
    kinds = ["k"] if "k" in attention.option_names() else []
    if tokens is not None and "keep" in tokens.per_layer:
        kinds.append("keep")
    if not kinds or (tokens is not None and "keep" not in kinds):
        raise InvalidOption(
            f"search() varies k per site and keep per block, and {strategy.name!r} has not both: "
            "search 'connectivity' or another attention strategy, 'token_drop', or 'hybrid'"
        )
    return kinds
