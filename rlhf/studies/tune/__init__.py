"""Hyperparameter search with the same number of trials for every algorithm."""
