"""Adapter to the trainers of TRL and transformers."""
