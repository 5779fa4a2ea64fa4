"""Reward over-optimization: gold score against distance from the initial policy."""
