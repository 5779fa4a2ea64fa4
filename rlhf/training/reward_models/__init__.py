"""Training of reward models, with one module for each group of similar kinds.

A kind is defined by a subclass of `base.RewardKind` and a row of `rlhf.config.reward.MODEL_KINDS`.
"""
