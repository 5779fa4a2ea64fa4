"""Side-by-side measurements against TRL and others: ``python -m benchmarks WORKLOAD``.

Run from a checkout; see docs/performance.md. Nothing of the toolkit imports this package.
"""
