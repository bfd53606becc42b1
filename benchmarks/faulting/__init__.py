"""Deliberate faults and a count of their effects, for `benchmarks/faults.py`."""
