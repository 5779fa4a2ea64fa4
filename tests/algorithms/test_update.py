"""From rewards to losses through a row: shaping, unscored episodes, denominators, tallies."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf.algorithms.advantages import estimate_advantages, penalized_rewards
from rlhf.algorithms.batch import TrainingBatch
from rlhf.algorithms.losses import compute_loss, loss_denominator
from rlhf.algorithms.metrics import MetricSums, masked_sum_and_count
from rlhf.algorithms.registry import configured_algorithm
from tests.algorithms.batches import batch_of

NAN = math.nan
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_kl_in_the_reward():
    batch = batch_of(
        MASK,
        rewards=torch.tensor([[0.0, 1.0, NAN], [NAN, NAN, NAN]]),
        old_logprobs=torch.tensor([[-1.0, -2.0, NAN], [-1.0, NAN, NAN]]),
        ref_logprobs=torch.tensor([[-2.0, -1.0, NAN], [-1.0, NAN, NAN]]),
    )
    found = penalized_rewards(configured_algorithm("rloo"), batch, kl_coef=0.1)
    expected = torch.tensor([[-0.1, 1.1, 0.0], [NAN, 0.0, 0.0]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_rewards_stay_where_the_row_charges_nothing():
    batch = batch_of(MASK, rewards=torch.tensor([[0.0, 1.0, NAN], [2.0, NAN, NAN]]))
    for name in ("grpo", "dapo", "online_dpo"):
        found = penalized_rewards(configured_algorithm(name), batch, kl_coef=0.1)
        assert found.tolist() == [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]


def test_costs_in_the_reward():
    batch = batch_of(
        MASK,
        rewards=torch.tensor([[0.0, 1.0, NAN], [2.0, NAN, NAN]]),
        costs=torch.tensor([[2.0, 0.0, NAN], [1.0, NAN, NAN]]),
    )
    algorithm = configured_algorithm("ppo_lagrangian", kl_placement="none")
    found = penalized_rewards(algorithm, batch, multiplier=3.0)
    torch.testing.assert_close(found, torch.tensor([[-1.5, 0.25, 0.0], [-0.25, 0.0, 0.0]]))


def test_a_missing_input_is_named():
    batch = batch_of(MASK, rewards=MASK.float(), old_logprobs=MASK.float())
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        penalized_rewards(configured_algorithm("rloo"), batch, kl_coef=0.1)
    with pytest.raises(ValueError, match="needs values"):
        estimate_advantages(configured_algorithm("ppo"), batch)
    with pytest.raises(ValueError, match="needs groups"):
        estimate_advantages(configured_algorithm("rloo"), batch)


@pytest.mark.parametrize("name", ["ppo", "rloo", "reinforce++", "best_of_n", "online_dpo"])
def test_unscored_episodes_teach_nothing(name: str):
    """The batch with an unscored third episode gives the others what the batch without it does."""
    mask = torch.ones(4, 2, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 4.0], [0.0, NAN], [0.0, 2.0]])
    algorithm = configured_algorithm(name)

    def estimate(rows: list[int]) -> TrainingBatch:
        batch = batch_of(
            mask[rows],
            rewards=rewards[rows],
            groups=torch.zeros(len(rows)),
            turns=torch.zeros(len(rows), 2, dtype=torch.long),
            values=torch.full((len(rows), 2), 0.5),
            bootstrap=torch.zeros(len(rows)),
        )
        return estimate_advantages(algorithm, batch)

    whole, without = estimate([0, 1, 2, 3]), estimate([0, 1, 3])
    assert not whole.require("loss_mask")[2].any()
    assert (whole.require("advantages")[2] == 0).all()
    assert (whole.require("returns")[2] == 0).all()
    kept = whole.select(torch.tensor([0, 1, 3]))
    torch.testing.assert_close(kept.require("advantages"), without.require("advantages"))
    torch.testing.assert_close(kept.require("returns"), without.require("returns"))
    assert (kept.require("loss_mask") == without.require("loss_mask")).all()


def test_pairs_share_a_unit_and_the_rest_is_left_out():
    mask = torch.ones(5, 1, dtype=torch.bool)
    rewards = torch.tensor([[2.0], [0.0], [1.0], [3.0], [3.0]])
    groups = torch.tensor([0, 0, 0, 1, 1])
    batch = estimate_advantages(
        configured_algorithm("online_dpo"), batch_of(mask, rewards=rewards, groups=groups)
    )
    assert batch.require("loss_mask")[:, 0].tolist() == [True, True, False, False, False]
    assert batch.require("pair_ids").tolist() == [0, 0, 2, 3, 4]
    assert batch.require("advantages")[:, 0].tolist() == [2.0, -2.0, 0.0, 0.0, 0.0]
    assert (
        float(
            loss_denominator(
                configured_algorithm("online_dpo"), batch.require("loss_mask"), max_tokens=9
            )
        )
        == 1.0
    )


def test_only_winners_are_imitated():
    rewards = torch.tensor([[2.0], [0.0], [2.0], [1.0], [1.0]])
    mask, groups = torch.ones(5, 1, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 1])
    batch = estimate_advantages(
        configured_algorithm("best_of_n"), batch_of(mask, rewards=rewards, groups=groups)
    )
    assert batch.require("loss_mask")[:, 0].tolist() == [True, False, True, False, False]
    assert batch.require("advantages")[:, 0].tolist() == [0.5, 0.0, 0.5, 0.0, 0.0]


def test_denominators():
    expected = {"token": 3, "sequence": 2, "constant": 20}
    for aggregation, number in expected.items():
        algorithm = configured_algorithm("rloo", aggregation=aggregation)
        mask = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.bool)])
        assert float(loss_denominator(algorithm, mask, max_tokens=10)) == number


def test_nothing_to_learn_gives_zero_not_nan():
    algorithm, mask = configured_algorithm("grpo"), torch.zeros(2, 3, dtype=torch.bool)
    nothing = torch.full((2, 3), NAN)
    batch = batch_of(
        mask, rewards=nothing, groups=torch.zeros(2), old_logprobs=nothing, ref_logprobs=nothing
    )
    batch = estimate_advantages(algorithm, batch)
    new = nothing.clone().requires_grad_()
    denominator = loss_denominator(algorithm, batch.require("loss_mask"), max_tokens=3)
    loss, tally = compute_loss(algorithm, new, batch, denominator=denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert new.grad is not None
    assert (new.grad == 0).all()
    assert "policy/clip_fraction" not in tally.compute()


def test_extra_terms_of_the_loss():
    """At ratio 1 with no advantage only the divergence and the entropy are left."""
    algorithm = configured_algorithm("grpo", aggregation="token", entropy_coef=0.5)
    new = torch.tensor([[-1.0, -1.0, NAN], [-1.0, NAN, NAN]])
    batch = batch_of(
        MASK,
        rewards=torch.zeros(2, 3),
        groups=torch.zeros(2),
        old_logprobs=new,
        ref_logprobs=new - 2.0,
    )
    loss, tally = compute_loss(
        algorithm,
        new,
        estimate_advantages(algorithm, batch),
        denominator=3,
        entropy=torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]]),
        kl_coef=0.1,
    )
    k3 = math.exp(-2.0) + 1.0
    assert loss.item() == pytest.approx(0.1 * k3 - 0.5 * 2.0)
    assert tally.compute()["policy/entropy"] == pytest.approx(2.0)
    assert tally.compute()["policy/kl_in_loss"] == pytest.approx(k3)


def critic_loss(algorithm, values, batch):
    """The critic's term alone, for a policy that has not moved."""
    logprobs = torch.zeros_like(values)
    return compute_loss(
        algorithm,
        logprobs,
        replace(batch, old_logprobs=logprobs),
        denominator=1,
        values=values,
        critic_denominator=batch.require("loss_mask").sum(),
        critic_only=True,
    )


def test_critic_loss_is_weighted_and_its_tally_is_not():
    algorithm = configured_algorithm("ppo", value_coef=0.25, value_clip=0.0)
    batch = batch_of(
        MASK,
        rewards=torch.tensor([[0.0, 2.0, NAN], [4.0, NAN, NAN]]),
        values=torch.zeros(2, 3),
        bootstrap=torch.zeros(2),
    )
    batch = estimate_advantages(algorithm, batch)
    # returns: 2 * .95, 2, 4
    loss, tally = critic_loss(algorithm, torch.zeros(2, 3), batch)
    plain = 0.5 * (1.9**2 + 4 + 16) / 3
    assert tally.compute()["value/loss"] == pytest.approx(plain)
    assert loss.item() == pytest.approx(0.25 * plain)


def test_a_batch_of_one_token():
    one = torch.ones(1, 1)
    batch = batch_of(one.bool(), rewards=one, values=0 * one, bootstrap=torch.zeros(1))
    batch = estimate_advantages(configured_algorithm("ppo"), batch)
    loss, _ = critic_loss(configured_algorithm("ppo"), 0 * one, batch)
    assert loss.item() == pytest.approx(0.1 * 0.5)


def test_tally_is_the_mean_of_all_not_of_the_means():
    mask = torch.tensor([True, True, False])
    left = MetricSums(
        means={"a": masked_sum_and_count(torch.tensor([1.0, 2.0, NAN]), mask)},
        sums={"loss": torch.tensor(0.5)},
        maxima={"top": torch.tensor(3.0)},
    )
    right = MetricSums(
        means={"a": masked_sum_and_count(torch.tensor([9.0]), mask[:1])},
        sums={"loss": torch.tensor(0.25)},
        maxima={"top": torch.tensor(1.0)},
    )
    both = (MetricSums() + left + right).compute()
    assert both == {"a": 4.0, "loss": 0.75, "top": 3.0}
