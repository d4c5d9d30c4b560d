"""MACs, memory and times of a patched model by section, counted while it runs."""

from sparsiattn.analysis.profiling.accounting import ACCOUNTINGS
from sparsiattn.analysis.profiling.profiler import profile
from sparsiattn.analysis.profiling.result import Profile
