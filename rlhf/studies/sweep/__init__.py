"""Sweeps: runs of one training command with several settings and seeds."""
