"""Rollouts: chat formats, sampling, collection and batches."""
