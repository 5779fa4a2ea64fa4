"""Rollout engine that samples on vLLM servers over HTTP."""
