"""Search of budgets per site and per block that meet one budget of the whole model.

`settings` and `space` define the search space, `evaluation` runs a candidate, `budget` compares
candidates, `pareto` estimates them from single changes, `plan` sets the number of trials,
`evolution` is the search itself, and `searching` has the public function.
"""

from sparsiattn.analysis.schedule_search.budget import Budget
from sparsiattn.analysis.schedule_search.evaluation import Trial, TrialRunner
from sparsiattn.analysis.schedule_search.evolution import Search
from sparsiattn.analysis.schedule_search.pareto import CostModel
from sparsiattn.analysis.schedule_search.plan import Plan
from sparsiattn.analysis.schedule_search.result import SearchResult
from sparsiattn.analysis.schedule_search.searching import search
from sparsiattn.analysis.schedule_search.settings import Setting
from sparsiattn.analysis.schedule_search.space import Candidate, Space, space_of

__all__ = [
    "Budget",
    "Candidate",
    "CostModel",
    "Plan",
    "Search",
    "SearchResult",
    "Setting",
    "Space",
    "Trial",
    "TrialRunner",
    "search",
    "space_of",
]
