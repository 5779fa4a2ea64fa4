"""Typed configuration of every command. Nothing here imports torch."""
