"""Hyperparameter search with an equal budget for every algorithm."""
