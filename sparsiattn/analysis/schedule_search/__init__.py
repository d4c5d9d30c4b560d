"""Finding budgets per site and per block that meet a budget of the whole model."""

from sparsiattn.analysis.schedule_search.result import SearchResult
from sparsiattn.analysis.schedule_search.search import search

__all__ = ["SearchResult", "search"]
