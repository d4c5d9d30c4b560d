"""analysis/profiling."""
