"""Environments of a rollout: calls with limits, threads and processes."""
