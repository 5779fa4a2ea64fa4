"""Online policy optimization: estimators, losses and controllers that use no models.

`registry` contains one row for each algorithm. The modules `registry`, `algorithm`, `settings` and
`components` do not import torch.
"""
