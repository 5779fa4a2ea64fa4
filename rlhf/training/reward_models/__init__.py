"""Training of reward models: one file for each group of kinds, and their shared parts.

A kind is a subclass of `base.RewardKind` and a row of `rlhf.config.reward.KINDS`.
"""
