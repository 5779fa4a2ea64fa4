"""Compare the speed of the toolkit with TRL and other packages: ``python -m benchmarks WORKLOAD``.

A side is one implementation of a workload, for example the toolkit or TRL with its default
settings. The benchmarks run from a checkout (see docs/performance.md). The toolkit does not import
this package.
"""
