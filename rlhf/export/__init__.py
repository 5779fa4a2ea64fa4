"""Export a trained model with a model card and a data card, and upload it to the Hub."""

from rlhf.export.export import Export, export_model

__all__ = ["Export", "export_model"]
