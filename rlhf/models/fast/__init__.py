"""Faster passes that are compared with the model's own before they are used."""
