"""The Python interface: functions for training, evaluation and reports, and their results.

The package `rlhf` exports the names: `rlhf.ppo`, `rlhf.Run` and so on.
"""
