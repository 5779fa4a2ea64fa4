"""Online policy optimization as pure functions of tensors: no model, no config object, no I/O.

`registry` holds one row per algorithm. `registry`, `algorithm`, `settings` and `components` do not
import torch.
"""
