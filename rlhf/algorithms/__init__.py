"""Online policy optimization as pure functions of tensors: no model, no config object, no I/O.

`registry` holds one row per algorithm and shows how a training loop calls the functions of
`advantages`, `losses` and `penalties`. `registry`, `algorithm`, `settings` and `components` do not
import torch.
"""
