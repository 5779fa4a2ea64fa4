"""Online policy optimization as pure functions of tensors, without models, configuration and I/O.

`registry` has one row for each algorithm. The modules `registry`, `algorithm`, `settings` and
`components` do not import torch.
"""
