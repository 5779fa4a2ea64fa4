"""The table of online algorithms, with one row for each algorithm.

This module does not import torch. The training code does not depend on the names of algorithms, but
on the properties of their rows. `examples/ppo_from_scratch.py` shows a training loop with one of
these algorithms.
"""

from dataclasses import fields, replace

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.settings import Settings, setting_names
from rlhf.common.names import did_you_mean
from rlhf.common.registry import Registry
from rlhf.errors import UserError

_BUILT_IN_ALGORITHMS = (
    Algorithm(
        name="ppo",
        title="Proximal policy optimization",
        paper="Schulman et al. 2017, arXiv:1707.06347; Huang et al. 2024, arXiv:2403.17031",
        equation="-min(r A, clip(r, 1 - e, 1 + e) A),  A = sum (gamma lam)^l delta",
        equation_source="Schulman et al. 2017, eq. 7 (objective), 11 and 12 (advantages)",
        summary="critic, GAE and a clipped ratio per token; KL in the reward",
        loss="clipped",
        settings=Settings(num_epochs=4, whiten_advantages=True),
        unbiased=False,
        bias="with lam < 1, errors of the critic bias the advantages; whitening and the token mean "
        "rescale the gradient by random factors; the ratio is clipped. With lam 1, no whitening "
        "and constant aggregation, the gradient is unbiased at ratio 1",
        fixed_point="pi*",
    ),
    Algorithm(
        name="ppo_lagrangian",
        title="PPO under a cost constraint",
        paper="Ray et al. 2019, Benchmarking Safe Exploration; Dai et al. 2023, arXiv:2310.12773",
        equation="PPO on (R - v C) / (1 + v),  log v += lr v (mean C - limit)",
        equation_source="Dai et al. 2023, eq. 31 (multiplier); see ppo for the objective",
        summary="PPO with a Lagrange multiplier that keeps the mean cost per episode below a limit",
        loss="clipped",
        settings=Settings(num_epochs=4, whiten_advantages=True),
        unbiased=False,
        bias="as for ppo; the policy gradient is that of the Lagrangian with the current "
        "multiplier",
        fixed_point="best policy within the cost limit",
        constrained=True,
    ),
    Algorithm(
        name="grpo",
        title="Group relative policy optimization",
        paper="Shao et al. 2024, arXiv:2402.03300",
        equation="-mean_i mean_t [min(r A, clip(r) A) - b k3],  A = (R - mean R) / std R",
        equation_source="Shao et al. 2024, eq. 3 (objective) and 4 (KL)",
        summary="group mean and standard deviation in place of a critic; KL in the loss",
        loss="clipped",
        settings=Settings(
            advantage="group_relative",
            scale_by_std=True,
            aggregation="sequence",
            group_size=8,
            kl_placement="loss",
            kl_estimator="k3",
            kl_coef=0.04,
        ),
        unbiased=False,
        bias="division by the standard deviation gives groups with a small spread more weight; the "
        "mean over each sequence gives short sequences more weight; the gradient of k3 as a loss "
        "is that of KL(reference || policy)",
        fixed_point="a policy other than pi*: the reward is divided by its standard deviation, and "
        "the KL is that of the reference to the policy",
    ),
    Algorithm(
        name="dr_grpo",
        title="GRPO done right",
        paper="Liu et al. 2025, arXiv:2503.20783",
        equation="-sum_t min(r A, clip(r) A) / L,  A = R - mean R",
        equation_source="Liu et al. 2025, section 3.2",
        summary="GRPO without its two normalizations",
        loss="clipped",
        settings=Settings(
            advantage="group_relative", aggregation="constant", group_size=8, kl_placement="none"
        ),
        unbiased=True,
        bias="none at ratio 1, except for the factor (G - 1) / G",
        fixed_point="argmax of the reward; pi* if the KL is in the reward",
    ),
    Algorithm(
        name="rloo",
        title="REINFORCE, leave one out",
        paper="Ahmadian et al. 2024, arXiv:2402.14740",
        equation="-sum_t A log pi / L,  A_i = R_i - mean of R_j, j != i",
        equation_source="Ahmadian et al. 2024, section 2.3, an equation without a number",
        summary="the baseline of a rollout is the mean return of the other rollouts of its group",
        loss="clipped",
        settings=Settings(advantage="leave_one_out", aggregation="constant", group_size=4),
        unbiased=True,
        bias="none at ratio 1",
        fixed_point="pi*",
    ),
    Algorithm(
        name="reinforce++",
        title="REINFORCE with batch normalization",
        paper="Hu et al. 2025, arXiv:2501.03262",
        equation="PPO's loss,  A = (R_to_go - mean) / std over the batch",
        equation_source="Hu et al. 2025, version 9, eq. 4 (return) and 5 (normalization)",
        summary="return to go, whitened over the whole batch; no critic and no groups",
        loss="clipped",
        settings=Settings(
            advantage="return_to_go", whiten_advantages=True, kl_coef=0.01, num_minibatches=2
        ),
        unbiased=False,
        bias="the batch's mean, standard deviation and token count depend on the episode itself; "
        "this bias decreases as 1 / batch size",
        fixed_point="pi*",
    ),
    Algorithm(
        name="reinforce++-baseline",
        title="REINFORCE++ with a group baseline",
        paper="Hu et al. 2025, arXiv:2501.03262",
        equation="PPO's loss + b k2,  A = whiten(R - mean of group)",
        equation_source="Hu et al. 2025, version 9, eq. 6 and 7 (advantages) and 8 (objective)",
        summary="group mean as baseline, standard deviation of the whole batch, k2 in the loss",
        loss="clipped",
        settings=Settings(
            advantage="group_relative",
            whiten_advantages=True,
            group_size=8,
            kl_placement="loss",
            kl_estimator="k2",
            kl_coef=0.01,
        ),
        unbiased=False,
        bias="the advantages, but not the KL, are divided by the batch's standard deviation, which "
        "changes the weight of the KL; k2 per token ignores the effect of a token on later states",
        fixed_point="a policy other than pi*, because the advantages are divided by their standard "
        "deviation; with a small kl_coef, the argmax of the reward",
    ),
    Algorithm(
        name="dapo",
        title="Decoupled clip and dynamic sampling",
        paper="Yu et al. 2025, arXiv:2503.14476",
        equation="-sum_t min(r A, clip(r, 1 - .2, 1 + .28) A) / tokens,  A as in GRPO",
        equation_source="Yu et al. 2025, eq. 8 (objective), 11 (dynamic sampling) and 13 (length)",
        summary="GRPO with a higher upper clip bound, token mean and soft length limit; groups "
        "with equal scores are replaced",
        loss="clipped",
        settings=Settings(
            advantage="group_relative",
            scale_by_std=True,
            clip_high=0.28,
            group_size=8,
            num_minibatches=4,
            kl_placement="none",
            dynamic_sampling=True,
            overlong_fraction=0.2,
        ),
        unbiased=False,
        bias="division by the standard deviation, and the exclusion of groups with equal scores, "
        "give groups with a small spread more weight; the token mean rescales the gradient by a "
        "random factor",
        fixed_point="argmax of the reward",
    ),
    Algorithm(
        name="gspo",
        title="Group sequence policy optimization",
        paper="Zheng et al. 2025, arXiv:2507.18071",
        equation="-min(s A, clip(s) A),  s = (pi / pi_old)^(1 / length)",
        equation_source="Zheng et al. 2025, eq. 5 (objective) and 7 (ratio)",
        summary="GRPO with one clipped ratio per sequence",
        loss="clipped_sequence",
        settings=Settings(
            advantage="group_relative",
            scale_by_std=True,
            aggregation="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
            group_size=8,
            num_minibatches=4,
            kl_placement="none",
        ),
        unbiased=False,
        bias="division by the standard deviation gives groups with a small spread more weight; the "
        "mean over each sequence gives short sequences more weight; off policy, the root of the "
        "ratio is not an importance weight",
        fixed_point="argmax of the reward",
    ),
    Algorithm(
        name="cispo",
        title="Clipped importance-sampling weights",
        paper="MiniMax 2025, arXiv:2506.13585",
        equation="-sg(clip(r, 1 - e, 1 + e')) A log pi / tokens",
        equation_source="MiniMax 2025, eq. 4 (objective) and 5 (weight)",
        summary="clips the importance weight, which has no gradient, so that clipped tokens "
        "keep their gradient",
        loss="clipped_weight",
        settings=Settings(
            advantage="group_relative",
            scale_by_std=True,
            clip_low=1.0,
            clip_high=4.0,
            group_size=8,
            num_minibatches=4,
            kl_placement="none",
        ),
        unbiased=False,
        bias="division by the standard deviation gives groups with a small spread more weight; the "
        "token mean rescales the gradient by a random factor",
        fixed_point="argmax of the reward",
    ),
    Algorithm(
        name="best_of_n",
        title="Best-of-n distillation (RAFT, expert iteration)",
        paper="Dong et al. 2023, arXiv:2304.06767; Anthony et al. 2017, arXiv:1705.08439",
        equation="-log pi(best of G)",
        equation_source="Dong et al. 2023, algorithm 1",
        summary="imitates the best rollout of each group",
        loss="likelihood",
        settings=Settings(advantage="best_of_group", group_size=8, kl_placement="none"),
        unbiased=False,
        bias="imitates the best-of-n policy, so the update depends only on the ranks of the scores",
        fixed_point="argmax of the reward",
    ),
    Algorithm(
        name="online_dpo",
        title="Direct preference optimization on sampled pairs",
        paper="Rafailov et al. 2023, arXiv:2305.18290; Guo et al. 2024, arXiv:2402.04792",
        equation="-[p log s(m) + (1 - p) log s(-m)],  m = b (log-ratio of the pair), p = s(R - R')",
        equation_source="Rafailov et al. 2023, eq. 7 (loss); Guo et al. 2024 (sampled pairs)",
        summary="best and worst rollout of each group as a preference pair; no critic, no ratio",
        loss="pairwise",
        settings=Settings(
            advantage="best_and_worst", group_size=2, kl_placement="none", kl_coef=0.1
        ),
        unbiased=False,
        bias="the gradient is that of a preference loss, not of the mean return; the optimum is "
        "the same with soft labels, and deterministic with hard labels",
        fixed_point="pi*; the argmax of the reward with hard labels",
    ),
)

ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm", {row.name: row for row in _BUILT_IN_ALGORITHMS}
)
"""All algorithms, by name. `rlhf.plugins.register_algorithm` adds an algorithm."""


def configured_algorithm(name: str, **overrides: object) -> Algorithm:
    """Return the algorithm `name` with some of its settings replaced.

    Raises:
        UserError: The algorithm or a setting is unknown, a value is out of range, the components
            are incompatible, or an override would have no effect in the resulting combination.
    """
    row = ALGORITHMS.require(name)
    for key in overrides:
        if key not in setting_names():
            hint = did_you_mean(key, setting_names()) or f"; known: {', '.join(setting_names())}"
            raise UserError(f"unknown setting {key!r}{hint}")
    row = replace(row, settings=replace(row.settings, **overrides))  # type: ignore[arg-type]
    row.check()
    for key in overrides:
        if key not in row.settings_with_effect:
            raise UserError(
                f"{key} has no effect with {name}: {row.why_setting_has_no_effect(key)}"
            )
    return row


def algorithm_table() -> list[dict[str, str]]:
    """Return one row of strings for each algorithm, by column name.

    The column "defaults" lists only the settings that affect the algorithm. The column "source" is
    empty for the algorithms of the toolkit; for others it is the file or module that added them.
    """
    return [
        {
            "name": row.name,
            "title": row.title,
            "paper": row.paper,
            "equation": row.equation,
            "equation source": row.equation_source,
            "summary": row.summary,
            "critic": "yes" if row.needs_critic else "no",
            "groups": "yes" if row.needs_groups else "no",
            "unbiased": "yes" if row.unbiased else "no",
            "bias": row.bias,
            "fixed point": row.fixed_point,
            "defaults": ", ".join(
                f"{field.name} {getattr(row.settings, field.name)}"
                for field in fields(Settings)
                if field.name in row.settings_with_effect
            ),
            "source": ALGORITHMS.sources.get(row.name, ""),
        }
        for row in ALGORITHMS.values()
    ]
