"""Explanations of the scores of a reward model."""
