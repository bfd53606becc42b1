"""Faults that are made on purpose, and what is counted afterwards, for `benchmarks/faults.py`."""
