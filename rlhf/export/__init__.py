"""Export a trained model with a model card and a data card, and upload it to the Hub."""

from rlhf.export.export import export_model

__all__ = ["export_model"]
