"""Training with the offline methods (SFT, reward models, DPO, KTO) and the online algorithms."""
