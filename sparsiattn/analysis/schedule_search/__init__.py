"""Budgets per site and per block that meet one budget of the whole model.

`space` says what there is to choose, `evaluation` runs a choice, `pareto` estimates choices from
single changes, `evolution` puts them together.
"""

from sparsiattn.analysis.schedule_search.evaluation import TrialRunner
from sparsiattn.analysis.schedule_search.evolution import search
from sparsiattn.analysis.schedule_search.pareto import CostModel
from sparsiattn.analysis.schedule_search.result import SearchResult
from sparsiattn.analysis.schedule_search.space import Space, space_of

__all__ = ["CostModel", "SearchResult", "Space", "TrialRunner", "search", "space_of"]
