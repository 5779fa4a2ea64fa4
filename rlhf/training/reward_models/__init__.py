"""Training of reward models, with one file for each group of similar kinds.

A kind is a subclass of `base.RewardKind` and a row of `rlhf.config.reward.MODEL_KINDS`.
"""
