"""An advantage estimator and a KL estimator, and an algorithm that combines existing parts."""

from rlhf.algorithms.advantages import Advantages
from rlhf.plugins import Settings, register_advantage, register_algorithm, register_kl

plugin_api = 1


@register_advantage("sign", "sign of the return", reads=("gamma",))
def sign_of_return(batch, settings):
    """Return the discounted sign of each episode's score as the advantage of its tokens."""
    return Advantages(settings.gamma * batch.scores().sign())


@register_kl("absolute", "absolute value of the log ratio")
def absolute(log_ratio):
    """Return |log pi - log ref|, [B, T]."""
    return log_ratio.abs()


register_algorithm(
    "sign_reinforce",
    title="REINFORCE on the sign of the return",
    loss="clipped",
    settings=Settings(advantage="sign", kl_placement="loss", kl_estimator="absolute"),
)
