"""Benchmarks: what Medley costs, beside what others cost, in one run on the same rows."""
