"""Training: the offline stages (SFT, reward models, DPO, KTO) and the online algorithms."""
