"""From what single choices cost and save to choices for all genes at once."""

from __future__ import annotations

import random

from sparsiattn.analysis.schedule_search.space import Choice, Space


class Model:
    """Sums of measured single changes. harm: divergence of each gene's share by itself; saved: the
    MACs that it saves by itself."""

    def __init__(
        self, space: Space, harm: dict[tuple[int, float], float],
        saved: dict[tuple[int, float], float],
    ) -> None:  # fmt: skip
        self.space, self.harm, self.saved = space, harm, saved

    def macs(self, choice: Choice) -> float:
        """What tokens that are gone cannot save again is left out: savings further on shrink with
        the tokens that are left, those of keys with their square."""
        total, left = float(self.space.macs), 1.0
        for i, (gene, share) in enumerate(zip(self.space.genes, choice, strict=True)):
            saved = self.saved.get((i, share), 0.0)
            total -= saved * (left**2 if gene.kind == "k" else left)
            left *= 1.0 if gene.kind == "k" else share
        return total

    def divergence(self, choice: Choice) -> float:
        return sum(self.harm.get((i, share), 0.0) for i, share in enumerate(choice))

    def at_price(self, price: float, start: Choice) -> Choice:
        """The choice that no change of a single gene betters, where a MAC costs ``price``."""
        best, changed = start, True
        worth = self.divergence(best) + price * self.macs(best)
        while changed:
            changed = False
            for i, gene in enumerate(self.space.genes):
                for share in gene.shares:
                    other = (*best[:i], share, *best[i + 1 :])
                    found = self.divergence(other) + price * self.macs(other)
                    if found < worth - 1e-12:
                        best, worth, changed = other, found, True
        return best

    def front(self, points: int = 48) -> list[Choice]:
        """Choices from dense to cheap, each the best for some price of a MAC: what a Lagrangian
        relaxation of the knapsack can reach. They ascend in price, so MACs descend."""
        prices = [10 ** (-16 + 13 * i / (points - 1)) for i in range(points)]
        found = [self.space.dense]
        for price in prices:
            found.append(self.at_price(price, found[-1]))
        return list(dict.fromkeys(found))


def mutated(model: Model, parent: Choice, budget: float, generator: random.Random) -> Choice | None:
    """A neighbour of at most ``budget`` MACs, as far as sums can tell, None if luck was bad: one to
    three genes a step up or down."""
    genes, child = model.space.genes, list(parent)
    for _ in range(generator.choice((1, 2, 2, 3))):
        i = generator.randrange(len(genes))
        shares = genes[i].shares
        step = shares.index(child[i]) + generator.choice((-1, 1))
        child[i] = shares[min(max(step, 0), len(shares) - 1)]
    found = tuple(child)
    return found if found != parent and model.macs(found) <= budget else None
