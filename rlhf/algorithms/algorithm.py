"""`Algorithm`, the type of a registry row, with the checks of its settings.

This module does not import torch.
"""

from dataclasses import dataclass

from rlhf.algorithms.components import CRITIC_SETTINGS, Component, registered_components
from rlhf.algorithms.settings import Settings, require_setting
from rlhf.errors import UserError

_ALWAYS_EFFECTIVE = {
    "advantage",
    "num_epochs",
    "num_minibatches",
    "group_size",
    "overlong_fraction",
}
_CONSTRAINT_SETTINGS = {"cost_limit", "multiplier_init", "multiplier_lr", "multiplier_max"}
_RATIO_SETTINGS = {"clip_low", "clip_high", "dual_clip", "value_clip"}


@dataclass(frozen=True)
class Algorithm:
    """An online algorithm, with its source, components and settings.

    The decorators of the loss and of the advantage estimator define what the algorithm needs.
    """

    name: str
    title: str
    paper: str
    equation: str
    summary: str
    loss: str
    """Name of a function decorated with `policy_loss`."""
    settings: Settings
    unbiased: bool
    """Whether the update is unbiased: the expected gradient of the first optimizer step on new
    rollouts is a positive multiple of the policy gradient of the mean return. With `kl_placement:
    reward`, the return includes the KL penalty."""
    bias: str
    """Phrase that lists the differences between the update and the exact policy gradient. For an
    unbiased algorithm, the phrase begins with "none" and states the conditions."""
    fixed_point: str
    """Policy to which the algorithm converges on a one-turn problem with infinite batches. pi* is
    the policy that maximizes the reward minus the KL penalty."""
    equation_source: str = ""
    """Places of the equation in the papers, such as "Schulman et al. 2017, eq. 7"."""
    constrained: bool = False
    """Whether a Lagrange multiplier keeps the mean cost below `cost_limit`."""

    @property
    def policy_loss(self) -> Component:
        """The registered policy loss."""
        return registered_components("losses")[self.loss]

    @property
    def advantage_estimator(self) -> Component:
        """The registered advantage estimator."""
        return registered_components("advantages")[self.settings.advantage]

    @property
    def needs_critic(self) -> bool:
        """Whether the algorithm needs the values of a critic."""
        return self.advantage_estimator.critic

    @property
    def needs_groups(self) -> bool:
        """Whether the algorithm needs groups of rollouts with the same start state."""
        return self.advantage_estimator.groups

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL to the reference is subtracted from the rewards."""
        return not self.policy_loss.reference and self.settings.kl_placement == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference is a separate term of the loss."""
        return not self.policy_loss.reference and self.settings.kl_placement == "loss"

    @property
    def needs_reference(self) -> bool:
        """Whether the algorithm needs log-probabilities of the reference policy."""
        return self.policy_loss.reference or self.kl_in_reward or self.kl_in_loss

    @property
    def settings_with_effect(self) -> frozenset[str]:
        """Names of the settings that affect the result of this algorithm."""
        names = _ALWAYS_EFFECTIVE | self.advantage_estimator.reads | self.policy_loss.reads
        if self.policy_loss.reference:
            names |= {"kl_coef"}
        else:
            names |= {"kl_placement"}
            if self.settings.kl_placement != "none":
                names |= {"kl_coef", "kl_estimator"}
        if self.needs_groups:
            names |= {"dynamic_sampling"}
        if self.constrained:
            names |= _CONSTRAINT_SETTINGS
        if self._one_step_per_batch:
            names -= _RATIO_SETTINGS
        return frozenset(names)

    @property
    def _one_step_per_batch(self) -> bool:
        return self.settings.num_epochs * self.settings.num_minibatches == 1

    def why_setting_has_no_effect(self, key: str) -> str:
        """Return the reason why the setting `key` has no effect; an error message ends with it."""
        reads = self.advantage_estimator.reads | self.policy_loss.reads
        if key in _RATIO_SETTINGS & reads and self._one_step_per_batch:
            return (
                "with one optimizer step per batch, the importance ratio is always 1 and the "
                "critic's values do not change before the loss is computed; increase num_epochs or "
                "num_minibatches"
            )
        if key in _CONSTRAINT_SETTINGS:
            return "the algorithm has no cost constraint; use ppo_lagrangian"
        no_kl = self.settings.kl_placement == "none" and not self.policy_loss.reference
        if key in ("kl_coef", "kl_estimator") and no_kl:
            return "kl_placement is none"
        if key in CRITIC_SETTINGS:
            return f"advantage {self.settings.advantage} has no critic"
        return f"advantage {self.settings.advantage} and loss {self.loss} do not use this setting"

    def check(self) -> None:
        """Check the settings.

        Raises:
            UserError: A value is outside its range, or the components are incompatible.
        """
        settings = self.settings
        settings.check()
        for key, module in (("advantage", "advantages"), ("kl_estimator", "kl")):
            require_setting(
                getattr(settings, key) in registered_components(module),
                key,
                f"be one of {', '.join(registered_components(module))}",
                repr(getattr(settings, key)),
            )
        if self.advantage_estimator.pairs != self.policy_loss.pairs:
            raise UserError(
                f"advantage {settings.advantage} cannot be used with {self.name}: an advantage "
                "that forms pairs (best_and_worst) and a loss on pairs (online_dpo) require each "
                "other"
            )
        if self.needs_groups and settings.group_size < 2:
            raise UserError(
                f"group_size must be at least 2 with advantage {settings.advantage} "
                f"(it compares the rollouts of a group), got {settings.group_size}"
            )
        if (
            self.kl_in_loss
            and not registered_components("kl")[settings.kl_estimator].differentiable
        ):
            raise UserError(
                f"kl_estimator {settings.kl_estimator} with kl_placement loss has no effect "
                "(its expected gradient is 0): set kl_estimator to k2 or k3, or kl_placement to "
                "reward"
            )
