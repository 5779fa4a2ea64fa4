"""Sides of the benchmarks that train with TRL."""
