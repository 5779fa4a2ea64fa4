"""Sharding of models over processes with FSDP2."""
