"""Training with the trainers of TRL and transformers."""
