"""A setting changes the numbers exactly where `settings_with_effect` says that it does."""

from dataclasses import replace

import pytest
import torch

from rlhf.algorithms.registry import ALGORITHMS
from tests.algorithms.batches import make_batch, off_policy, run

OTHER_VALUE = {
    "aggregation": lambda old: "token" if old != "token" else "sequence",
    "clip_low": lambda old: 0.05,
    "clip_high": lambda old: 0.05,
    "dual_clip": lambda old: 1.05,
    "tis_cap": lambda old: 1.5,
    "sequence_mask_low": lambda old: 0.9,
    "sequence_mask_high": lambda old: 1.1,
    "kl_placement": lambda old: "loss" if old != "loss" else "reward",
    "kl_estimator": lambda old: "k2" if old != "k2" else "k3",
    "kl_coef": lambda old: old + 0.3,
    "gamma": lambda old: 0.7,
    "lam": lambda old: 0.4,
    "turn_gamma": lambda old: 0.7,
    "turn_lam": lambda old: 0.4,
    "whiten_advantages": lambda old: not old,
    "scale_by_std": lambda old: not old,
    "entropy_coef": lambda old: 0.1,
    "value_coef": lambda old: old + 0.3,
    "value_clip": lambda old: old + 0.3,
    "pair_labels": lambda old: "hard",
}
LEFT_TO_THE_LOOP = (
    "num_epochs num_minibatches group_size overlong_fraction dynamic_sampling "
    "cost_limit multiplier_init multiplier_lr multiplier_max"
)
ROWS = {name: off_policy(name) for name in ALGORITHMS} | {
    "ppo, turns": off_policy("ppo", advantage="turn_gae"),
    "rloo, turns": off_policy("rloo", advantage="group_return_to_go"),
}
BATCH = make_batch(5)
MEANINGLESS = {  # these would change numbers, but weights and pairs would lose their meaning
    ("whiten_advantages", "best_of_n"),
    ("whiten_advantages", "online_dpo"),
    ("tis_cap", "best_of_n"),
    ("tis_cap", "online_dpo"),
    ("sequence_mask_low", "best_of_n"),
    ("sequence_mask_low", "online_dpo"),
    ("sequence_mask_high", "best_of_n"),
    ("sequence_mask_high", "online_dpo"),
    ("entropy_coef", "online_dpo"),
}


def test_no_setting_is_forgotten():
    settings = vars(ALGORITHMS["ppo"].settings)
    assert settings.keys() == OTHER_VALUE.keys() | set(LEFT_TO_THE_LOOP.split()) | {"advantage"}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("setting", OTHER_VALUE)
def test_effective_is_what_changes_the_gradient(row: str, setting: str):
    algorithm = ROWS[row]
    value = OTHER_VALUE[setting](getattr(algorithm.settings, setting))
    changed = replace(algorithm, settings=replace(algorithm.settings, **{setting: value}))
    if (setting, row) in MEANINGLESS:
        assert setting not in algorithm.settings_with_effect
        return
    before, after = run(algorithm, BATCH), run(changed, BATCH)
    same = torch.equal(before[0], after[0])
    if algorithm.needs_critic:
        same = same and torch.equal(before[1], after[1])
    assert same == (setting not in algorithm.settings_with_effect)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_has_no_effect_is_refused(name: str):
    for setting, other in OTHER_VALUE.items():
        if setting not in ROWS[name].settings_with_effect:
            value = other(getattr(ROWS[name].settings, setting))
            with pytest.raises(ValueError, match=f"{setting} has no effect with"):
                off_policy(name, **{setting: value})
