"""Typed configuration of every command. No module here imports torch, so that parsing is fast."""
