"""Typed configuration of every command. No module of the package imports torch."""
