"""Benchmarks of the public operations: `python -m benchmarks.run --op all`.

A family joins by adding `bench_<family>.py` with a list `BENCHMARKS` of `suite.Benchmark`s, nothing else.
"""
