"""The model card and the data card of an export."""
