"""Estimate the memory and the duration of a training run before it starts, for ``--dry-run``."""
