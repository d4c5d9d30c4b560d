"""Timing against dense attention: of a model, of its sites, and of kernels on this machine."""

from sparsiattn.analysis.benchmark.sites import measure_sites
from sparsiattn.analysis.benchmark.tuning import Tuning, tune
from sparsiattn.analysis.benchmark.whole_model import BenchResult, bench
