"""The preference bandit: gold reward by hand, optimum, expert and the flaw of the proxy."""

import numpy as np
import pytest

from rlhf.envs import preference_bandit as task
from rlhf.envs.preference_bandit import PreferenceBandit


def conversation(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


PROMPT = "a tired vegan guest arrives on a hot day"


def test_gold_reward_by_hand():
    # starter, hot twice + tired once: soup 0+5, salad 16+2, melon 18+3, olives 8+1, dumplings 2+0,
    # bruschetta 6+4, so [2, 21]; main, vegan + tired: tofu 18+1, curry 16+2, ..., steak 0;
    # drink, hot + tired: water 14+1, lemonade 16+3, ..., cocoa 4, wine 18.
    soup, tofu, water = (5 - 2) / 19, 1.0, (15 - 4) / 15
    expected = (soup + tofu + water) / 3
    replies = [
        "soup tofu water",
        "Soup, tofu, water.",
        "soup tofu water please thanks",
        "tofu soup water",
    ]
    scores = task.gold_reward([conversation(PROMPT, reply) for reply in replies])
    assert scores == pytest.approx([expected, expected, expected - 0.1, 0.0])


def test_every_context_has_exactly_one_best_menu_of_value_one():
    for context in task.CONTEXTS:
        values = [task.menu_value(context, menu) for menu in task.MENUS]
        assert values.count(1.0) == 1
        assert max(values) == 1.0
        assert task.menu_value(context, task.best_menu(context)) == 1.0


def test_random_value_is_the_mean_of_the_reward_function_over_all_texts():
    env = PreferenceBandit()
    everything = [
        conversation(prompt, menu)
        for prompt in map(task.prompt_of, task.CONTEXTS)
        for menu in env.legal_actions()
    ]
    assert env.random_value() == pytest.approx(np.mean(task.gold_reward(everything)))
    assert env.optimal_value() == 1.0


def test_environment_reward_equals_the_reward_function():
    env = PreferenceBandit()
    env.action_space.seed(1)
    for seed in range(50):
        prompt, _ = env.reset(seed=seed)
        reply = env.action_space.sample()
        _, reward, terminated, truncated, info = env.step(reply)
        assert [reward] == task.gold_reward([conversation(prompt, reply)])
        assert [info["proxy"]] == task.proxy_reward([conversation(prompt, reply)])
        assert (terminated, truncated, info["valid"]) == (True, False, True)


def test_maximizing_the_proxy_lowers_gold():
    gold, proxy, exploited = [], [], []
    for context in task.CONTEXTS:
        for menu in task.MENUS:
            gold.append(task.gold_score(context, " ".join(menu)))
            proxy.append(task.proxy_score(context, " ".join(menu)))
        best = task.best_menu(context)
        honest, greedy = " ".join(best), " ".join([*best[:2], *["wine"] * 9])
        assert task.proxy_score(context, greedy) > task.proxy_score(context, honest) + 0.4
        assert task.gold_score(context, greedy) < task.gold_score(context, honest) - 0.35
        exploited.append(task.gold_score(context, greedy))
    assert np.corrcoef(gold, proxy)[0, 1] > 0.9
    assert np.mean(exploited) < np.mean(gold)


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_expert_quality_sets_the_share_of_best_slots(quality: float):
    env, rng = PreferenceBandit(), np.random.default_rng(0)
    hits = []
    for seed in range(400):
        prompt, _ = env.reset(seed=seed)
        context = task.context_in(prompt)
        assert context is not None
        chosen = env.expert(rng, quality=quality).split()
        hits += [a == b for a, b in zip(chosen, task.best_menu(context), strict=True)]
    expected = quality + (1 - quality) / 6
    assert np.mean(hits) == pytest.approx(
        expected, abs=4 * (expected * (1 - expected) / len(hits)) ** 0.5 + 1e-9
    )


def test_vocabulary_is_small_and_covers_prompts_and_replies():
    words = set(task.vocabulary())
    assert len(words) < 70
    assert {word for c in task.CONTEXTS for word in task.prompt_of(c).split()} <= words
    assert {word for menu in task.MENUS for word in menu} <= words


def test_a_conversation_without_a_guest_is_an_error():
    with pytest.raises(ValueError, match="need a user message that describes a guest"):
        task.gold_reward([conversation("hello", "soup tofu water")])


def test_expert_below_full_quality_needs_a_generator():
    env = PreferenceBandit()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="generator"):
        env.expert(quality=0.5)
