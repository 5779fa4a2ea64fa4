"""Models: sources, loading, heads, precision, adapters and log-probabilities.

Unless stated otherwise, an argument ``model`` is a transformers model, possibly in a PEFT wrapper.
"""
