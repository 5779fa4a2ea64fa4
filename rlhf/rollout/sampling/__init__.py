"""Sample from a policy: engine interface, continuous batching, caches and decoders."""
