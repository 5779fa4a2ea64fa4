"""Online policy optimization: pure functions of tensors that use no models and read no files.

`registry` contains one row for each algorithm. The modules `registry`, `algorithm`, `settings` and
`components` do not import torch.
"""
