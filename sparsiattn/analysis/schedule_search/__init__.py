"""Budgets per site and per block that meet one budget of the whole model.

`space` says what there is to choose, `evaluation` runs a choice, `pareto` estimates choices from
single changes, `search` puts them together. The command line and the root import from here.
"""

from sparsiattn.analysis.schedule_search.result import SearchResult
from sparsiattn.analysis.schedule_search.search import search

__all__ = ["SearchResult", "search"]
