"""Faster forward passes, which are compared with the model's own before they are used."""
