"""Wrappers change only what they document."""

import gymnasium as gym
import numpy as np
import pytest

from rlhf import envs  # noqa: F401 (registers the ids)
from rlhf.envs.parsing import PARSERS, ParseAction
from rlhf.envs.wrappers import (
    CostBudget,
    FewShot,
    History,
    InvalidActions,
    ObservationNoise,
    RewardCallable,
)


def make(name: str, **kwargs) -> gym.Env:
    return gym.make(f"text/{name}", **kwargs)


def test_history_repeats_the_window_and_no_more():
    env = History(make("GuessNumber-v0"), turns=1)
    first, _ = env.reset(seed=1)
    second = env.step("1")[0]
    assert second == f"{first}\n> 1\nhigher. 3 guesses left."
    assert env.step("2")[0] == "higher. 3 guesses left.\n> 2\nhigher. 2 guesses left."
    assert env.reset(seed=1)[0] == first


def test_history_of_everything_and_of_nothing():
    everything, nothing = History(make("GuessNumber-v0")), History(make("GuessNumber-v0"), turns=0)
    for env in (everything, nothing):
        env.reset(seed=1)
        env.step("1")
    assert everything.step("2")[0].count(">") == 2
    assert nothing.step("2")[0] == "higher. 2 guesses left."


def test_invalid_actions_are_penalized_or_end_the_episode():
    env = InvalidActions(make("Bandit-v0"), penalty=0.25, end=True)
    env.reset(seed=0)
    _, reward, done, _, _ = env.step("arm 1")
    assert reward in (0.0, 1.0)
    assert not done
    _, reward, done, truncated, info = env.step("the best one")
    assert (reward, done, truncated, info["valid"]) == (-0.25, True, False, False)


def test_invalid_actions_can_be_replaced_without_changing_other_draws():
    env, plain = InvalidActions(make("Bandit-v0"), substitute="random"), make("Bandit-v0")
    for _ in range(2):
        env.reset(seed=3)
        plain.reset(seed=3)
        for _ in range(10):
            text, reward, _, _, info = env.step("junk")
            assert info["valid"]
            assert info["substituted"]
            arm = text.split(" paid")[0]
            assert plain.step(arm)[1] == reward
    env.reset(seed=0)
    assert env.step("arm 2")[4]["substituted"] is False
    for spelling in ("2", " ARM 2. ", "`arm 2`"):  # the environment accepts these, too
        assert env.step(spelling)[0].startswith("arm 2 paid")


def test_invalid_action_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="substitute"):
        InvalidActions(make("Bandit-v0"), substitute="random", end=True)
    with pytest.raises(ValueError, match="at least 0"):
        InvalidActions(make("Bandit-v0"), penalty=-1)


@pytest.mark.parametrize(
    ("form", "reply", "action"),
    [
        ("answer", "I think <answer>a</answer> or <answer> lookup ada </answer>.", "lookup ada"),
        ("answer", "<answer>lookup ada", None),
        ("boxed", "so \\boxed{12} or rather \\boxed{13}", "13"),
        ("tool", '{"name": "lookup", "arguments": {"who": "ada"}}', "lookup ada"),
        (
            "tool",
            'ok <tool_call>\n{"name": "answer", "arguments": {"n": 3}}</tool_call>',
            "answer 3",
        ),
        ("tool", '```json\n{"name": "verify"}\n```', "verify"),
        ("tool", '{"name": 3}', None),
        ("tool", "[1, 2]", None),
        ("tool", "}{", None),
        ("last_line", "thinking\nlookup ada\n", "lookup ada"),
        ("last_line", "  ", None),
    ],
)
def test_parsing(form, reply, action):
    assert PARSERS[form](reply) == action


def test_parse_action_passes_the_parsed_action():
    env = ParseAction(make("ToolLookup-v0"), form="tool")
    env.reset(seed=0)
    text, _, _, _, info = env.step('{"name": "lookup", "arguments": {"name": "ada"}}')
    assert text.startswith("ada: room")
    assert (info["parsed"], info["valid"]) == (True, True)
    info = env.step("hm")[4]
    assert (info["parsed"], info["valid"]) == (False, False)


class Recorder(gym.Env):
    """Records the action that it receives."""

    def reset(self, *, seed=None, options=None):
        return "", {}

    def step(self, action):
        self.action = action
        return "", 0.0, True, False, {}


@pytest.mark.parametrize(
    ("form", "reply", "action"),
    [
        ("answer", "<think><answer>a</answer></think><answer>b</answer>", "b"),
        ("answer", "<answer>b</answer><think> or <answer>a</answer>", "b"),
        ("answer", "<think>maybe <answer>a</answer></think>", None),
        ("answer", "<think>maybe <answer>a</answer>", None),
        ("answer", "maybe <answer>a</answer></think>", None),
        ("boxed", r"<think>\boxed{a}</think>", None),
        ("boxed", r"<think>\boxed{a}</think>\boxed {b}", "b"),
        ("boxed", r"\fbox{\frac{1}{2}}", r"\frac{1}{2}"),
        ("last_line", "<think>a</think>b", "b"),
        ("answer", '<answer>print("</think>")</answer>', 'print("</think>")'),
        ("last_line", "<think>a</think>\nsay '<think>'", "say '<think>'"),
        ("tool", '{"name": "go", "parameters": {"where": "left"}}', "go left"),
        ("tool", r'{"name": "go", "arguments": "{\"where\": \"left\"}"}', "go left"),
        ("tool", '{"name": "go", "arguments": "left"}', None),
        ("tool", '<think>{"name": "go"}</think>', None),
    ],
)
def test_parse_action_ignores_reasoning(form, reply, action):
    recorder = Recorder()
    info = ParseAction(recorder, form=form).step(reply)[4]
    assert recorder.action == (reply if action is None else action)
    assert info["parsed"] == (action is not None)


def test_few_shot_examples_are_solved_and_leave_the_episode_alone():
    env, plain = FewShot(make("TMaze-v0"), count=2), make("TMaze-v0")
    text, _ = env.reset(seed=4)
    assert text.count("> forward") == 8
    assert text.endswith(f"Now you:\n{plain.reset(seed=4)[0]}")


def test_observation_noise_drops_words_at_its_rate_and_repeats_with_the_seed():
    env = ObservationNoise(make("Wordle-v0"), drop=0.3)
    dropped, total = 0, 0
    for seed in range(200):
        text, _ = env.reset(seed=seed)
        assert env.reset(seed=seed)[0] == text
        words = text.split()
        dropped, total = dropped + words.count("_"), total + len(words)
    assert abs(dropped / total - 0.3) < 4 * (0.3 * 0.7 / total) ** 0.5
    silent = ObservationNoise(make("TMaze-v0"), drop=0.0)
    assert silent.reset(seed=0)[0] == make("TMaze-v0").reset(seed=0)[0]


def test_observation_noise_keeps_the_empty_text_of_the_last_turn():
    env = ObservationNoise(make("Echo-v0"), drop=1.0)
    env.reset(seed=0)
    assert env.step("x")[0] == ""


def test_reward_callable_scores_the_conversation_at_the_end():
    seen = []

    def reward(conversations):
        seen.extend(conversations)
        return [0.5]

    env = RewardCallable(make("GuessNumber-v0", guesses=2, numbers=3), reward, mix="add")
    prompt, info = env.reset(seed=0)
    assert info["scored"] is False
    env.step("zero")
    _, paid, done, _, info = env.step("nothing")
    assert (paid, done, info["env_reward"], info["scored"]) == (0.5, True, 0.0, True)
    assert [m["role"] for m in seen[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert (seen[0][1]["content"], seen[0][-1]["content"]) == (prompt, "nothing")


def test_reward_callable_replaces_the_reward_and_reports_unscored():
    env = RewardCallable(make("Echo-v0"), lambda conversations: [None])
    text, _ = env.reset(seed=0)
    _, paid, _, _, info = env.step(text.split()[-1])
    assert (paid, info["env_reward"], info["scored"]) == (0.0, 1.0, False)


def test_cost_budget_ends_the_episode_when_it_is_exceeded():
    class Spender(gym.Wrapper):
        def step(self, action):
            text, reward, terminated, truncated, info = self.env.step(action)
            return text, reward, terminated, truncated, {**info, "cost": 0.5}

    env = CostBudget(Spender(make("Bandit-v0")), 1.0, penalty=2.0)
    for _ in range(2):
        env.reset(seed=0)
        spent = [env.step("arm 1") for _ in range(3)]
        assert [step[4]["spent"] for step in spent] == [0.5, 1.0, 1.5]
        assert [step[2] for step in spent] == [False, False, True]
        assert spent[2][1] <= -1.0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: History(env, turns=2),
        lambda env: InvalidActions(env, penalty=0.1),
        lambda env: ParseAction(env, form="boxed"),
        lambda env: FewShot(env, count=1),
        lambda env: ObservationNoise(env, drop=0.2),
        lambda env: CostBudget(env, 1.0),
    ],
)
def test_a_wrapped_environment_can_be_rebuilt_from_its_json_spec(wrap):
    env = wrap(make("TMaze-v0"))
    text = env.spec.to_json()
    twin = gym.envs.registration.EnvSpec.from_json(text).make()
    assert env.reset(seed=5)[0] == twin.reset(seed=5)[0]
    actions = np.random.default_rng(0).choice(["forward", "left", "hm"], size=4).tolist()
    assert [env.step(a)[:3] for a in actions] == [twin.step(a)[:3] for a in actions]
