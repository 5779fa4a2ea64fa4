"""Sampling from a policy: the engine interface, continuous batching, caches and decoders."""
