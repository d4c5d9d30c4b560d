"""Finding budgets per site and per block that meet a budget of the whole model."""

from sparsiattn.searching.result import SearchResult
from sparsiattn.searching.search import search

__all__ = ["SearchResult", "search"]
