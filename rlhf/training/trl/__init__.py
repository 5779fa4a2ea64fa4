"""TRL at the edge: what its trainers are given."""
