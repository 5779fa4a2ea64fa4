"""Models: sources, loading, heads, precision, adapters and log-probabilities.

An argument ``model`` is a transformers model or a PEFT model around one, unless stated otherwise.
"""
