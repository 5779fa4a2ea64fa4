"""Episodes: how they start, end and are counted; replies come from a script or a tiny model."""

import copy
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit

from rlhf.config.rollout import RolloutSpec
from rlhf.envs.prompts import PromptEnv
from rlhf.errors import UserError
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.collector import Collector
from rlhf.rollout.environments.calls import EnvironmentCaller
from rlhf.rollout.environments.workers import LockstepWorkers
from rlhf.rollout.episode import EpisodeSeed
from tests.helpers.models import tiny_model
from tests.helpers.rollouts import (
    TOKENIZER,
    FakeEngine,
    Tales,
    collect_one,
    episode_seeds,
    make_collector,
    record_pass_lengths,
)


@pytest.fixture(autouse=True)
def _no_environments():
    Tales.made.clear()


def test_the_environment_ends_the_episode():
    engine = FakeEngine("go", "stop")
    rollout = collect_one(engine)
    assert (rollout.terminated, rollout.truncated) == (True, False)
    assert (rollout.num_turns, rollout.num_length_limited, rollout.invalid) == (2, 0, 0)
    assert rollout.stopped
    assert [m["role"] for m in rollout.conversation] == ["user", "assistant"] * 2
    assert [m["content"] for m in rollout.conversation[1:]] == ["go", "turn 1", "stop"]
    ends = [t for t, token in enumerate(rollout.tokens) if rollout.is_action[t] and token == 1]
    assert [rollout.env_rewards[t] for t in ends] == [1.0, 2.0]  # on each turn's last sampled token
    assert [rollout.costs[t] for t in ends] == [0.5, 0.5]
    assert sum(rollout.env_rewards) == 3.0
    text = TOKENIZER.apply_chat_template(rollout.conversation, tokenize=False)
    assert rollout.tokens == TOKENIZER(text)["input_ids"]


def test_info_message_of_other_types_is_ignored():
    class Chatty(Tales):
        def reset(self, **keywords):
            observation, info = super().reset(**keywords)
            return observation, {**info, "message": "level 1"}

    engine = FakeEngine("stop")
    rollout = collect_one(engine, Chatty)
    assert rollout.conversation[0] == {
        "role": "user",
        "content": rollout.conversation[0]["content"],
    }


def test_a_time_limit_truncates_and_leaves_the_last_state():
    engine = FakeEngine("go")
    rollout = collect_one(engine, lambda: TimeLimit(Tales(), 2))
    assert (rollout.terminated, rollout.truncated) == (False, True)
    replies = 2 * len(TOKENIZER("go<|end|>")["input_ids"])
    assert (rollout.num_turns, rollout.num_sampled_tokens) == (2, replies)
    assert rollout.conversation[-1] == {"role": "user", "content": "turn 2"}
    assert not rollout.is_action[-1]
    assert TOKENIZER.decode(rollout.tokens).endswith("<|end|><|user|>turn 2<|end|><|assistant|>")


def test_termination_and_truncation_at_once_is_termination():
    engine = FakeEngine("stop")
    rollout = collect_one(engine, lambda: TimeLimit(Tales(), 1))
    assert (rollout.terminated, rollout.truncated) == (True, False)
    assert rollout.is_action[-1]


def test_length_limited_reply_ends_turn_not_episode():
    engine = FakeEngine("a very long reply that is cut", "stop")
    rollout = collect_one(engine, max_new_tokens=5)
    assert (rollout.terminated, rollout.truncated, rollout.num_length_limited) == (True, False, 1)
    assert rollout.stopped  # the last reply did end
    assert sum(rollout.is_action) == 5 + len(TOKENIZER("stop<|end|>")["input_ids"])
    text = TOKENIZER.apply_chat_template(rollout.conversation, tokenize=False)
    assert TOKENIZER.decode(rollout.tokens) == text
    # The token that closes the cut turn is not the policy's.
    close = rollout.tokens.index(1, rollout.is_action.index(True))
    assert not rollout.is_action[close]


@pytest.mark.parametrize("limits", [{"max_tokens": 60}, {"context": 60}])
def test_the_token_budget_truncates(limits):
    engine = FakeEngine("go")
    rollout = collect_one(engine, **limits)
    assert (rollout.terminated, rollout.truncated) == (False, True)
    assert 50 < len(rollout.tokens) <= 60
    assert rollout.conversation[-1]["role"] == "user"


def test_a_reply_may_use_the_whole_budget():
    engine = FakeEngine("a very long reply " * 20)
    rollout = collect_one(engine, max_tokens=30)
    assert rollout.truncated
    assert not rollout.stopped
    assert len(rollout.tokens) == 30
    assert rollout.is_action[-1]


def test_prompt_without_room_is_user_error():
    engine = FakeEngine("go")
    with pytest.raises(UserError, match=r"prompt of seed 7 has \d+ tokens") as error:
        collect_one(engine, seed=7, max_tokens=8)
    assert "\n" not in str(error.value)


def test_group_shares_prompt_but_not_noise():
    model, _ = tiny_model(double=True)
    group = [EpisodeSeed(5, group_index=0, sample_index=m) for m in range(3)]
    rollouts = make_collector(model, lambda: TimeLimit(Tales(), 2), max_new_tokens=6).collect(group)
    prompts = {tuple(r.tokens[: r.is_action.index(True)]) for r in rollouts}
    assert len(prompts) == 1
    assert len({tuple(r.tokens) for r in rollouts}) == 3
    assert [(r.seed, r.group_index, r.sample_index) for r in rollouts] == [
        (5, 0, m) for m in range(3)
    ]


def same(a: Sequence[Any], b: Sequence[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        for name in ("seed", "sample_index", "tokens", "is_action", "turn", "conversation"):
            assert getattr(x, name) == getattr(y, name)
        assert x.env_rewards == y.env_rewards
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-12)


def test_episodes_are_reproducible_for_any_parallelism():
    model, _ = tiny_model(double=True)
    order = episode_seeds(9, 3, 14, 2, 7)

    def played(parallel: int) -> list[Any]:
        torch.manual_seed(parallel)  # nothing hangs on the global generators
        np.random.seed(parallel)
        limited = lambda: TimeLimit(Tales(), 3)  # noqa: E731
        return make_collector(model, limited, parallel=parallel, max_new_tokens=7).collect(order)

    first = played(64)
    assert [r.seed for r in first] == [9, 3, 14, 2, 7]
    assert [r.group_index for r in first] == [0, 1, 2, 3, 4]
    for again in (played(64), played(1), played(2)):
        same(first, again)


def test_rollouts_are_the_policys_own_log_probabilities():
    model, _ = tiny_model(double=True)
    limited = make_collector(model, lambda: TimeLimit(Tales(), 4), max_new_tokens=5)
    for rollout in limited.collect(episode_seeds(0, 1, 2)):
        tokens = torch.tensor([rollout.tokens])
        full = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        for t, own in enumerate(rollout.is_action):
            expected = full[t - 1, rollout.tokens[t]].item() if own else 0.0
            assert abs(rollout.logprobs[t] - expected) < 1e-9


def test_temperature_can_be_overridden():
    model, _ = tiny_model(double=True)
    limited = make_collector(model, lambda: TimeLimit(Tales(), 1), max_new_tokens=6)
    twins = [EpisodeSeed(1, group_index=0, sample_index=m) for m in range(3)]
    greedy = limited.collect(twins, temperature=0)
    assert len({tuple(r.tokens) for r in greedy}) == 1


def test_env_failure_names_seed():
    engine = FakeEngine("fail")
    with pytest.raises(
        UserError, match=r"seed 41: RuntimeError: broken \(rollouts\.py:\d+\)"
    ) as error:
        collect_one(engine, seed=41)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_failures_can_be_counted():
    class Fragile(Tales):
        def step(self, action):
            if self.start % 2:
                raise RuntimeError("odd")
            return super().step(action)

    engine = FakeEngine("stop")
    lenient = make_collector(engine, Fragile, errors="count")
    seeds = range(8)
    odd = [s for s in seeds if np.random.default_rng(s).integers(1000) % 2]
    rollouts = lenient.collect(episode_seeds(*seeds))
    ((reason, count),) = lenient.workers.caller.failures.items()
    assert re.fullmatch(r"environment: RuntimeError: odd \(test_collect\.py:\d+\)", reason)
    assert count == len(odd)
    assert odd
    assert [r.seed for r in rollouts] == [s for s in seeds if s not in odd]
    assert [r.group_index for r in rollouts] == [s for s in seeds if s not in odd]


def test_failed_environment_is_replaced():
    """Seed 1 breaks the environment for good; whoever plays in it next would suffer."""

    class Brittle(Tales):
        broken = False

        def step(self, action):
            self.broken = self.broken or self.start == broken_start
            if self.broken:
                raise RuntimeError("broken for good")
            return super().step(action)

    engine = FakeEngine("stop")
    broken_start = int(np.random.default_rng(1).integers(1000))
    Tales.made.clear()
    lenient = make_collector(engine, Brittle, errors="count", parallel=1)
    rollouts = lenient.collect(episode_seeds(0, 1, 2, 3))
    assert [r.seed for r in rollouts] == [0, 2, 3]
    ((reason, count),) = lenient.workers.caller.failures.items()
    assert reason.startswith("environment: RuntimeError: broken for good (test_collect.py:")
    assert count == 1
    old, new = Tales.made
    assert (old.closed, new.closed) == (True, False)
    assert lenient.envs == [new]


def test_all_environments_failed_is_user_error():
    engine = FakeEngine("fail")
    with pytest.raises(UserError, match="the environment failed in every episode"):
        collect_one(engine, errors="count")


def test_environments_are_kept_and_closed():
    engine = FakeEngine("stop")
    playing = make_collector(engine, parallel=2)
    playing.collect(episode_seeds(1, 2, 3, 4, 5))
    playing.collect(episode_seeds(1, 2))
    assert len(Tales.made) == 2
    playing.close()
    assert all(env.closed for env in Tales.made)
    assert playing.envs == []


def test_the_system_message_is_the_specs_or_the_environments():
    engine = FakeEngine("stop")

    class Polite(Tales):
        system_prompt = "Be polite."

    assert collect_one(engine, lambda: TimeLimit(Polite(), 3)).conversation[0] == {
        "role": "system",
        "content": "Be polite.",
    }
    assert collect_one(engine, Polite, system="Be quick.").conversation[0]["content"] == "Be quick."
    assert collect_one(engine, Tales).conversation[0]["role"] == "user"


def test_earlier_messages_come_first():
    engine = FakeEngine("stop")
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    rollout = collect_one(engine, lambda: Tales(messages=earlier), system="S")
    assert [m["role"] for m in rollout.conversation[:4]] == ["system", "user", "assistant", "user"]
    assert rollout.num_turns == 1  # the earlier reply was not sampled
    own = [{"role": "system", "content": "mine"}, *earlier]
    for system, expected in (("S", "S"), (None, "mine")):
        said = collect_one(engine, lambda: Tales(messages=own), system=system).conversation
        assert [m["content"] for m in said if m["role"] == "system"] == [expected]


def test_a_ten_turn_episode_passes_through_the_model_once(monkeypatch):
    model, _ = tiny_model(double=True, context=512)
    passed = record_pass_lengths(monkeypatch, model)
    playing = make_collector(model, lambda: TimeLimit(Tales(), 10), max_new_tokens=8, context=512)
    rollout = playing.collect(episode_seeds(3))[0]
    assert rollout.num_turns == 10
    tokens = sum(map(sum, passed))
    assert tokens <= 1.05 * len(rollout.tokens)
    decoded = tokens - playing.engine.prefill_tokens
    assert (
        decoded == rollout.num_sampled_tokens - 10
    )  # the first token of a reply comes with the prefill


def test_free_row_starts_next_episode(monkeypatch):
    class Patient(Tales):
        """Plays as many turns as its seed says."""

        def reset(self, *, seed=None, options=None):
            self.left = seed
            return super().reset(seed=seed)

        def step(self, action):
            self.left -= 1
            return "go on", 1.0, self.left == 0, False, {}

    model, _ = tiny_model(double=True, context=512)
    passed = record_pass_lengths(monkeypatch, model)
    order = episode_seeds(8, 1, 1, 1, 2, 3)
    playing = make_collector(model, Patient, parallel=2, max_new_tokens=5, context=512)
    rollouts = playing.collect(order)
    assert [r.num_turns for r in rollouts] == [8, 1, 1, 1, 2, 3]
    assert [r.seed for r in rollouts] == [8, 1, 1, 1, 2, 3]
    alone = make_collector(model, Patient, parallel=1, max_new_tokens=5, context=512).collect(order)
    same(rollouts, alone)
    assert len(Patient.made) == 2 + 1
    assert all(len(counts) <= 2 for counts in passed)


def test_group_prefills_prompt_once(monkeypatch):
    model, _ = tiny_model(double=True)
    passed = record_pass_lengths(monkeypatch, model)
    group = [EpisodeSeed(5, group_index=0, sample_index=m) for m in range(4)]
    rollouts = make_collector(model, lambda: TimeLimit(Tales(), 1), max_new_tokens=4).collect(group)
    prompt = rollouts[0].is_action.index(True)
    assert passed[0] == [prompt]
    assert max(map(len, passed)) == 4


REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}"
    "{% elif m.content == 'turn 1' %}{{ raise_exception('Not this text') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("errors", ["raise", "count"])
@pytest.mark.parametrize("system", ["Be kind.", None])
def test_template_refusal_is_not_an_env_failure(errors, system):
    engine = FakeEngine("go")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = REFUSES
    chat_format = ChatFormat(tokenizer)
    spec = RolloutSpec(system=system)
    workers = LockstepWorkers(EnvironmentCaller(errors))
    found = Collector(engine, Tales, chat_format, spec, context=256, workers=workers)
    with pytest.raises(UserError, match="chat template refuses") as error:
        found.collect(episode_seeds(0))
    assert "environment failed" not in str(error.value)
    if system:
        with pytest.raises(UserError, match="No system role"):
            found.check_prompts_are_renderable(())


def test_all_prompts_are_checked_before_first_episode():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = REFUSES
    found = Collector(FakeEngine(), Tales, ChatFormat(tokenizer), RolloutSpec(), context=256)
    with pytest.raises(UserError, match=r"prompt 2 of env.prompts: .*Not this text"):
        found.check_prompts_are_renderable(
            [[{"role": "user", "content": text}] for text in ("a", "turn 1")]
        )


def test_prompt_keys_reach_rewards_and_tools_reach_template():
    engine = FakeEngine("4")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TOKENIZER.chat_template.replace(
        "{% for", "{{ tools[0].name if tools else '' }}{% for", 1
    )
    prompt = [{"role": "user", "content": "2+2?", "answer": "4", "tools": [{"name": "sum"}]}]
    make = partial(PromptEnv, [prompt])
    playing = Collector(engine, make, ChatFormat(tokenizer), RolloutSpec(), context=256)
    rollout = playing.collect(episode_seeds(0))[0]
    assert tokenizer.decode(rollout.tokens).startswith("sum<|user|>2+2?<|end|>")
    assert rollout.conversation[0]["answer"] == "4"


def test_requests_hold_the_whole_episode_and_rollouts_the_policy_version():
    engine = FakeEngine("go", "stop")
    engine.update_policy(4)
    rollout = collect_one(engine, seed=3, max_new_tokens=9, temperature=0.5)
    first, second = engine.submitted
    starts_at = rollout.is_action.index(True)
    assert first.prompt_ids == rollout.tokens[:starts_at]
    assert second.prompt_ids + TOKENIZER("stop<|end|>")["input_ids"] == rollout.tokens
    assert (first.seed[1:], second.seed[1:]) == ((3, 0, 0), (3, 0, 1))
    assert first.seed[0] == second.seed[0]
    assert (first.max_new_tokens, first.sampling.temperature) == (9, 0.5)
    assert first.sampling.stop_ids == {TOKENIZER.eos_token_id}
    assert rollout.policy_versions == [4] * len(rollout.tokens)
