"""Configuration classes of the commands. No module of this package imports torch."""
