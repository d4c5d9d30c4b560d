"""How often, and under what, the library gives a right answer or a documented error.

Run as ``python benchmarks/reliability``; `tests/integration/test_reliability.py` runs less of it.
"""
