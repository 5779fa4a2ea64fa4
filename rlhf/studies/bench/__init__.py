"""Benchmarks of algorithms over environments and seeds."""
