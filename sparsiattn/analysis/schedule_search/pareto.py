"""From what single choices cost and save to choices for all genes at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from sparsiattn.analysis.schedule_search.space import Choice, Space


@dataclass
class CostModel:
    """Estimates of any choice: sums of measured single changes.

    Attributes:
        space: What there is to choose.
        harm: Divergence of each gene's share by itself, by number of the gene and share.
        saved: MACs that it saves by itself.
    """

    space: Space
    harm: dict[tuple[int, float], float] = field(default_factory=dict)
    saved: dict[tuple[int, float], float] = field(default_factory=dict)

    def macs(self, choice: Choice) -> float:
        """Estimated MACs per image.

        Tokens that are gone cannot save again: savings further on shrink with the share of tokens
        left, those of keys with its square.
        """
        total, left = float(self.space.macs), 1.0
        for i, (gene, share) in enumerate(zip(self.space.genes, choice, strict=True)):
            saved = self.saved.get((i, share), 0.0)
            total -= saved * (left**2 if gene.kind == "k" else left)
            left *= 1.0 if gene.kind == "k" else share
        return total

    def divergence(self, choice: Choice) -> float:
        """Estimated divergence from the dense model."""
        return sum(self.harm.get((i, share), 0.0) for i, share in enumerate(choice))

    def at_price(self, price: float, start: Choice) -> Choice:
        """The choice that no change of a single gene improves, where a MAC costs ``price``."""
        best, best_cost = start, self.divergence(start) + price * self.macs(start)
        improved = True
        while improved:
            improved = False
            for i, gene in enumerate(self.space.genes):
                for share in gene.shares:
                    choice = (*best[:i], share, *best[i + 1 :])
                    cost = self.divergence(choice) + price * self.macs(choice)
                    if cost < best_cost - 1e-12:
                        best, best_cost, improved = choice, cost, True
        return best

    def front(self, points: int = 48) -> list[Choice]:
        """Choices from dense to cheap, each the best for some price of a MAC.

        What a Lagrangian relaxation of the knapsack can reach; prices ascend, so MACs descend.
        """
        choices = [self.space.dense]
        for i in range(points):
            choices.append(self.at_price(10 ** (-16 + 13 * i / (points - 1)), choices[-1]))
        return list(dict.fromkeys(choices))


def mutated(
    costs: CostModel, parent: Choice, budget: float, generator: random.Random
) -> Choice | None:
    """A neighbour of a choice: one to three genes a step up or down.

    Args:
        costs: Estimates the neighbour's MACs.
        parent: The choice to change.
        budget: MACs per image that the neighbour may have at most.
        generator: Draws the genes and steps.

    Returns:
        None if it drew the parent again, or a neighbour above the budget.
    """
    genes, child = costs.space.genes, list(parent)
    for _ in range(generator.choice((1, 2, 2, 3))):
        i = generator.randrange(len(genes))
        shares = genes[i].shares
        step = shares.index(child[i]) + generator.choice((-1, 1))
        child[i] = shares[min(max(step, 0), len(shares) - 1)]
    choice = tuple(child)
    return choice if choice != parent and costs.macs(choice) <= budget else None
