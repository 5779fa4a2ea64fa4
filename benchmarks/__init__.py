"""Compare the speed of the toolkit with TRL and other packages: ``python -m benchmarks WORKLOAD``.

The benchmarks run from a checkout; see docs/performance.md. The toolkit does not import this
package.
"""
