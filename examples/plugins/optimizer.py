"""An optimizer: steps in the direction of the sign of the gradient."""

import torch

from rlhf.plugins import register_optimizer

plugin_api = 1


class SignSGD(torch.optim.Optimizer):
    """signSGD (Bernstein et al. 2018, arXiv:1802.04434)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Update the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(weight.grad.sign(), alpha=group["lr"])


@register_optimizer("sign_sgd")
def sign_sgd(parameters, settings):
    """Return the optimizer with the learning rate of the configuration."""
    return SignSGD(parameters, lr=settings.learning_rate)
