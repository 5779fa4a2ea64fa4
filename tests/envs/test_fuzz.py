"""Random and malformed text never makes parsers and scorers raise or report success."""

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import envs
from rlhf.envs.check import MALFORMED_REPLIES
from rlhf.envs.core import normalized
from rlhf.envs.parsing import PARSERS
from rlhf.envs.preference_bandit import CONTEXTS, gold_score, menu_and_extra_tokens, proxy_score

MADE = {name: gym.make(f"text/{name}").unwrapped for name in envs.TASKS}
PIECES = (
    *MALFORMED_REPLIES[:20],
    "answer", "lookup", "ada", "arm", "1", "2", "9", "go", "paris", "sort", "|",
    "double", "soup", "tofu", "wine", "check", "bet", "verify", "forward", "left", ",", ".", "\n",
    "<answer>", "</answer>", "\\boxed{", "}", "{", '"name":', '"arguments"', "<tool_call>",
)  # fmt: skip


@pytest.mark.parametrize("name", envs.TASKS)
def test_junk_never_raises_and_never_succeeds(name):
    env = MADE[name]
    for seed, text in enumerate(MALFORMED_REPLIES):
        env.reset(seed=seed)
        for _ in range(env.max_turns):
            _, reward, done, _, info = env.step(text)
            assert np.isfinite(reward)
            assert not info.get("is_success", False)
            if done:
                break


@pytest.mark.parametrize("name", envs.TASKS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=10), seed=st.integers(0, 2**32 - 1))
def test_environments_accept_any_text(name, texts, seed):
    env = MADE[name]
    env.reset(seed=seed)
    legal = {normalized(action) for action in env.legal_actions()}
    for text in texts:
        _, reward, done, truncated, info = env.step(text)
        assert np.isfinite(reward)
        assert not truncated
        if done:
            assert not info.get("is_success", False) or any(normalized(t) in legal for t in texts)
            break


def test_environments_accept_random_strings():
    """Shuffled fragments of valid actions, through every parser and scorer."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 7, size=100_000)
    names = list(MADE)
    for i, count in enumerate(counts.tolist()):
        picks = rng.integers(len(PIECES), size=count).tolist()
        text = (" " if i % 2 else "").join(PIECES[p] for p in picks)
        for parse in PARSERS.values():
            assert isinstance(parse(text), str | None)
        context = CONTEXTS[i % len(CONTEXTS)]
        gold, proxy = gold_score(context, text), proxy_score(context, text)
        assert 0.0 <= gold <= 1.0
        assert 0.0 <= proxy <= 1.85 + 1e-9
        if menu_and_extra_tokens(text) is None:
            assert gold == proxy == 0.0
        env = MADE[names[i % len(names)]]
        env.reset()
        assert np.isfinite(env.step(text)[1])


@given(st.text(max_size=50))
def test_normalized_is_idempotent(text):
    assert normalized(normalized(text)) == normalized(text)


def test_digits_of_other_scripts_are_not_numbers():
    env = MADE["GuessNumber-v0"]
    env.reset(seed=0)
    for text in ("٣", "²", "５", "1e0", "+1", "1.0", "0x1"):
        assert env.step(text)[4]["valid"] is False
        env.reset(seed=0)
