"""Models: sources, loading, heads, precision, adapters and log-probabilities."""
