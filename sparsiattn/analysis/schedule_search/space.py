"""The search space: shares of keys and tokens, and options of the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparsiattn.analysis.schedule_search.settings import Setting
from sparsiattn.errors import InvalidOption
from sparsiattn.patching import Patch
from sparsiattn.patching.apply import parts_of
from sparsiattn.strategies import Config

KEYS = (1.0, 0.5, 0.25, 0.1, 0.05)
TOKENS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
MERGED_TOKENS = (1.0, 0.98, 0.95, 0.92, 0.88, 0.8)
"""Shares for strategies that merge at every block, where ``TOKENS`` would leave too few tokens."""

OF_ATTENTION = {"tile", "block", "background", "prefix_keys"}
"""Options that have no effect if all keys are kept."""


@dataclass(frozen=True)
class Gene:
    """One variable of the search: the share of keys at a site, or of tokens at a block.

    Attributes:
        name: Name of the site or block.
        kind: ``"k"``, ``"keep"``, or ``"r"``, which is a number of tokens in a schedule.
        depth: Position in the order of execution; removed tokens are missing in all later blocks.
        shares: Shares to choose from, 1 first.
    """

    name: str
    kind: str
    depth: float
    shares: tuple[float, ...]


class Candidate(NamedTuple):
    """One configuration of the whole model.

    Attributes:
        setting: Index of its options in `Space.settings`.
        shares: One share for every gene.
    """

    setting: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """The search space of one patched model.

    Attributes:
        genes: Variables in the order of execution.
        macs: MACs of the dense model per image.
        settings: Options of the whole model to choose from.
        uniform_blocks: Indices of the token genes that a uniform schedule sets.
        patches: Number of patch tokens of one image; 0 if not needed.
        is_exact: Whether shares of 1 everywhere give the dense model.
    """

    genes: tuple[Gene, ...]
    macs: int
    settings: tuple[Setting, ...]
    uniform_blocks: frozenset[int] = field(default=frozenset())
    patches: int = 0
    is_exact: bool = True

    @property
    def dense(self) -> Candidate:
        """The candidate that keeps everything, with the first options."""
        return Candidate(0, (1.0,) * len(self.genes))

    def keeps_all(self, candidate: Candidate) -> bool:
        """Whether a candidate equals the dense model."""
        return self.is_exact and candidate.shares == self.dense.shares

    def canonical(self, candidate: Candidate) -> Candidate:
        """The candidate with the first options, if its own options have no effect."""
        keys = [s for g, s in zip(self.genes, candidate.shares, strict=True) if g.kind == "k"]
        of_attention = set(self.settings[candidate.setting].options) <= OF_ATTENTION
        same = bool(keys) and min(keys) == 1.0 and self.is_exact and of_attention
        return Candidate(0, candidate.shares) if same else candidate

    def uniforms(self) -> dict[Candidate, dict[str, float]]:
        """Candidates with equal shares and their shares by option, without the dense model.

        Tokens are reduced at the strategy's default blocks. The first setting has every pair of
        shares, the others only shares of keys, or of tokens if there are no shares of keys.
        """
        shares = {gene.kind: gene.shares for gene in self.genes}
        tokens = next((kind for kind in shares if kind != "k"), "keep")
        candidates: dict[Candidate, dict[str, float]] = {}
        for setting in range(len(self.settings)):
            both = setting == 0 or "k" not in shares
            for k in shares.get("k", (1.0,)):
                for keep in shares.get(tokens, (1.0,)) if both else (1.0,):
                    named = {"k": k, "keep": keep, "ratio": keep}
                    names = ["ratio" if kind == "r" else kind for kind in shares]
                    candidate = Candidate(setting, self._equal(k, keep))
                    candidates.setdefault(candidate, {name: named[name] for name in names})
        return {c: names for c, names in candidates.items() if not self.keeps_all(c)}

    def _equal(self, k: float, keep: float) -> tuple[float, ...]:
        return tuple(
            k if gene.kind == "k" else (keep if i in self.uniform_blocks else 1.0)
            for i, gene in enumerate(self.genes)
        )

    def singles(self) -> list[Candidate]:
        """Candidates with one share below 1, the most informative first.

        First come middle shares of all genes, then the smallest ones, then the others.
        """
        dense, rounds = self.dense.shares, []
        for i, gene in enumerate(self.genes):
            shares = list(gene.shares[1:])
            first = shares[(len(shares) - 1) // 2 :][:1] + shares[-1:] + shares
            rounds.append([(*dense[:i], s, *dense[i + 1 :]) for s in dict.fromkeys(first)])
        longest = max(map(len, rounds), default=0)
        turns = [row[turn] for turn in range(longest) for row in rounds if turn < len(row)]
        return [Candidate(0, shares) for shares in turns]

    def schedule(self, candidate: Candidate) -> dict[str, dict[str, Any]]:
        """The schedule of a candidate, as `patch` takes it."""
        schedule: dict[str, dict[str, Any]] = {}
        remaining = self.patches
        for gene, share in zip(self.genes, candidate.shares, strict=True):
            if gene.kind == "r":
                merged = min(math.floor(remaining - remaining * share), remaining // 2)
                remaining -= merged
                if merged:
                    schedule.setdefault("r", {})[gene.name] = merged
            elif gene.kind == "k" or share < 1.0:
                schedule.setdefault(gene.kind, {})[gene.name] = share
        for gene in self.genes:  # at least one block must be named
            schedule.setdefault(gene.kind, {gene.name: 0 if gene.kind == "r" else 1.0})
        return schedule


def space_of(
    patch: Patch,
    settings: Sequence[Setting],
    keys: tuple[float, ...] = KEYS,
    tokens: tuple[float, ...] | None = None,
) -> Space:
    """The space of a patched model.

    Args:
        patch: The patch. If it reduces tokens, it must do so at the first block, so that it
            includes all blocks.
        settings: Options to choose from.
        keys: Shares of keys to choose from.
        tokens: Shares of tokens to choose from; None for the defaults of the strategy.

    Raises:
        InvalidOption: The strategy has no fixed cost or no scheduled options, or names a block that
            does not exist.
    """
    report, strategy = patch.report(), settings[0].strategy
    if report.macs is None:
        raise InvalidOption(
            f"the budget of {patch.strategy.name!r} with these options depends on the image, so a "
            "schedule has no fixed cost: search() needs shares, e.g. keep=0.7 instead of 'adaptive'"
        )
    kinds = kinds_of(strategy)
    genes = _token_genes(patch, strategy, kinds[-1], tokens) if kinds[-1] != "k" else []
    if "k" in kinds:
        depths = {runtime.site.name: float(i) for i, runtime in enumerate(patch.runtimes)}
        for block in patch.blocks:
            depths |= dict.fromkeys(block.block.sites, float(block.index))
        names = [runtime.site.name for runtime in patch.runtimes]
        genes = [Gene(name, "k", depths[name], keys) for name in names] + genes
    genes = sorted(genes, key=lambda gene: gene.depth)
    first = patch.blocks[0].site if patch.blocks else None
    return Space(
        tuple(genes),
        report.macs_dense,
        tuple(settings),
        uniform_blocks=_uniform_blocks(genes, strategy),
        patches=0 if first is None else first.tokens - first.prefix_tokens,
        is_exact=all(part is None or part.exact_at_full for part in parts_of(strategy)),
    )


def _token_genes(
    patch: Patch, strategy: Config, kind: str, shares: tuple[float, ...] | None
) -> list[Gene]:
    """A gene for every block at which the strategy may reduce tokens: all, or its ``layers``."""
    shares = shares or (MERGED_TOKENS if kind == "r" else TOKENS)
    if kind == "r" and shares[-1] < 0.5:
        raise InvalidOption(
            f"{strategy.name!r} merges at most half of the tokens at once: tokens must be floats "
            f"in [0.5, 1], got {shares!r}"
        )
    tokens = parts_of(strategy)[1]
    layers = None if tokens is None else tokens.layers
    known = {block.index for block in patch.blocks}
    missing = sorted(set(layers or ()) - known)
    if missing:
        raise InvalidOption(
            f"layers must be blocks of this model at which tokens can be reduced, {sorted(known)}, "
            f"got {missing}"
        )
    # tokens are reduced between attention and MLP
    return [
        Gene(block.block.name, kind, block.index + 0.5, shares)
        for block in patch.blocks
        if layers is None or block.index in layers
    ]


def _uniform_blocks(genes: Sequence[Gene], strategy: Config) -> frozenset[int]:
    blocks = [i for i, gene in enumerate(genes) if gene.kind != "k"]
    tokens = parts_of(strategy)[1]
    if tokens is None or tokens.layers is not None or not blocks:
        return frozenset(blocks)
    return frozenset(blocks[layer] for layer in tokens.default_layers(len(blocks)))


def kinds_of(strategy: Config) -> list[str]:
    """Options that a schedule of this strategy sets: ``k`` per site, ``keep`` or ``r`` per block.

    Raises:
        InvalidOption: The strategy has neither, or reduces tokens in another way.
    """
    attention, tokens = parts_of(strategy)
    kinds = ["k"] if "k" in attention.option_names() else []
    if tokens is not None:
        kinds += [kind for kind in ("keep", "r") if kind in tokens.per_layer][:1]
    if not kinds or (tokens is not None and kinds == ["k"]):
        raise InvalidOption(
            f"search() varies k per site and keep or r per block, but {strategy.name!r} has none "
            "of them: use 'connectivity' or another attention strategy, 'token_drop', "
            "'token_merge', or 'hybrid'"
        )
    return kinds
