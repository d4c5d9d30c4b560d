"""analysis/benchmark."""
