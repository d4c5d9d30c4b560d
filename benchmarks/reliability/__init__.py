"""How often, and under what, the library gives a right answer or a documented error.

Run as ``python benchmarks/reliability``; `tests/test_reliability.py` runs less of the same.
"""
