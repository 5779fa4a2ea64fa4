"""Load, check, adapt and save models, and compute log-probabilities.

Unless stated otherwise, an argument ``model`` is a Transformers model, possibly in a PEFT wrapper.
The trunk of a model is its decoder: the base model without the output head.
"""
