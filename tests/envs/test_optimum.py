"""No reply beats a stated optimum, and prompts state everything that determines it."""

import contextlib
import itertools
import zlib
from fractions import Fraction
from functools import cache

import gymnasium as gym
import numpy as np
import pytest

from rlhf import envs
from rlhf.envs import toy_text
from rlhf.envs.adversary import ERROR_RATE, successful_adversaries
from rlhf.envs.exact import NotEnumerableError, exact_value
from tests.envs.variants import VARIANTS, Variant, named

assert len(VARIANTS) >= 100

QUICK: list[Variant] = [
    ("text/CliffWalking-v0", {}),
    ("text/CliffWalking-v0", {"max_turns": 5}),
    ("text/Taxi-v0", {"max_turns": 6}),
    ("text/FrozenLake-v0", {"max_turns": 20}),
    ("text/PreferenceBandit-v0", {}),
    ("text/PreferenceBandit-v0", {"reward": "proxy"}),
    ("text/KuhnPoker-v0", {"opponent": "random", "seat": "random"}),
    ("text/KeyDoor-v0", {"size": 3, "step_cost": 0.02}),
    ("text/KnowledgeGraph-v0", {"hops": 2}),
    ("text/Support-v0", {"turns": 2}),
    ("text/Support-v0", {"cost_limit": 0.03, "turns": 3}),
    ("text/ToolLookup-v0", {"people": 3, "rooms": 2, "call_cost": 0.3}),
    ("text/Triage-v0", {"test_cost": 0.1}),
    ("text/TMaze-v0", {"length": 2, "steps": 3}),
    ("text/GuessNumber-v0", {"numbers": 7, "guesses": 2}),
    ("text/Wordle-v0", {"words": 12, "guesses": 2}),
    ("text/Recommend-v0", {"sessions": 2}),
    ("text/TicTacToe-v0", {"opponent": "optimal", "seat": "second"}),
    ("text/Bandit-v0", {"arms": 2, "horizon": 4}),
]
NOT_ENUMERABLE = {"Bandit", "ProgramSynthesis"}
"""A bandit compares two draws (see test_known_values); programs draw sets of hidden tests."""


def exact(env: gym.Env, max_steps: int) -> float:
    """The exact optimum; for a constrained task, that of its dual problem."""
    task = env.unwrapped
    price = task.cost_price()
    return exact_value(env, max_steps=max_steps, price=price) + (
        price * task.cost_limit if price else 0.0
    )


def try_to_beat(env_id, kwargs, max_steps):
    """Run the adversaries, and the exact solution if the task can be enumerated."""
    env = gym.make(env_id, **kwargs)
    stated = env.unwrapped.optimal_value()
    if kwargs.get("reward") != "proxy":  # whose best texts are beyond its menus
        with contextlib.suppress(NotEnumerableError):
            assert exact(env, max_steps) == pytest.approx(stated, abs=1e-8)
    assert successful_adversaries(env) == []


@pytest.mark.parametrize(("env_id", "kwargs"), QUICK, ids=named(QUICK))
def test_no_adversary_beats_the_optimum(env_id, kwargs):
    try_to_beat(env_id, kwargs, 25_000)


@pytest.mark.sweep
@pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=named(VARIANTS))
def test_no_adversary_beats_the_optimum_of_any_variant(env_id, kwargs):
    try_to_beat(env_id, kwargs, 150_000)


def test_exact_solution_covers_all_but_two_tasks():
    """Small variants here, larger ones in the sweep; two tasks cannot be enumerated."""
    small = {
        "Echo": {}, "TMaze": {}, "GuessNumber": {"numbers": 4, "guesses": 2}, "Triage": {},
        "KnowledgeGraph": {"hops": 1}, "KuhnPoker": {}, "FrozenLake": {"max_turns": 4},
        "CliffWalking": {"max_turns": 4}, "Taxi": {"max_turns": 2}, "Support": {"turns": 1},
        "ToolLookup": {"people": 3, "rooms": 2}, "Recommend": {"sessions": 1},
        "Wordle": {"words": 5}, "PreferenceBandit": {},
    }  # fmt: skip
    solved = {"KeyDoor-v0", "TicTacToe-v0"}
    for name, kwargs in small.items():
        env = gym.make(f"text/{name}-v0", **kwargs)
        assert exact(env, 150_000) == pytest.approx(env.unwrapped.optimal_value(), abs=1e-8), name
        solved.add(f"{name}-v0")
    left = {name.removesuffix("-v0") for name in set(envs.TASKS) - solved}
    assert left == NOT_ENUMERABLE | {"Prompts"}


@pytest.mark.parametrize(("arms", "horizon"), [(2, 4), (3, 3)])
def test_bandit_with_wasted_pulls_by_recursion_over_histories(arms, horizon):
    """An invalid action wastes its pull and gives no information; exact fractions."""

    @cache
    def value(history, left):
        if not left:
            return Fraction(0)
        options = [value(history, left - 1)]
        for arm in range(arms):
            pays = [paid for pulled, paid in history if pulled == arm]
            chance = Fraction(sum(pays) + 1, len(pays) + 2)
            after = [value((*history, (arm, paid)), left - 1) for paid in (0, 1)]
            options.append(chance * (1 + after[1]) + (1 - chance) * after[0])
        return max(options)

    env = gym.make("text/Bandit-v0", arms=arms, horizon=horizon).unwrapped
    assert env.optimal_value() == pytest.approx(float(value((), horizon)))


def test_cliff_walking_and_taxi_by_hand():
    """A malformed action costs as much as a step in both."""
    for name, turns in (("CliffWalking", 50), ("Taxi", 12), ("CliffWalking", 7)):
        env = gym.make(f"text/{name}-v0", max_turns=turns).unwrapped
        env.reset(seed=0)
        rewards = [env.step("junk")[1] for _ in range(turns)]
        assert rewards == [-1.0] * turns
        assert sum(rewards) <= env.optimal_value()
    # Twelve steps do not reach the goal, thirteen do.
    values = [
        gym.make("text/CliffWalking-v0", max_turns=t).unwrapped.optimal_value()
        for t in (12, 13, 14)
    ]
    assert values == [-12.0, -13.0, -13.0]


def test_wasted_step_by_hand():
    """State 0 can step at -2 or -5, state 1 at -1, or win 3 half of the time."""
    table = {
        0: {0: [(1.0, 1, -2.0, False)], 1: [(1.0, 0, -5.0, False)]},
        1: {0: [(1.0, 0, -1.0, False)], 1: [(0.5, 1, 3.0, True), (0.5, 0, -1.0, False)]},
    }
    assert toy_text.invalid_action_reward(table) == -2.0
    assert toy_text.invalid_action_reward({0: {0: [(1.0, 0, 4.0, False)]}}) == 0.0


def test_the_proxy_optimum_over_replies_around_a_menu():
    """All contexts and menus with every combination of up to nine further words."""
    from rlhf.envs import preference_bandit as bandit

    best = []
    for context in bandit.CONTEXTS[::5]:
        replies = (
            " ".join([*menu, *["wine"] * wine, *["tea"] * tea])
            for menu in bandit.MENUS
            for wine, tea in itertools.product(range(10), (0, 5, 9))
        )
        best.append(max(bandit.proxy_score(context, reply) for reply in replies))
    env = gym.make("text/PreferenceBandit-v0", reward="proxy").unwrapped
    assert best == pytest.approx([env.optimal_value()] * len(best))
    assert env.optimal_value() == pytest.approx(1.85)
    for seed in range(20):
        env.reset(seed=seed)
        assert env.step(env.expert())[1] == pytest.approx(1.85)
    assert env.reference_values()["bare_menu"] == pytest.approx(1.0432, abs=1e-4)


class Coin(gym.Env):
    """Every reply pays 0 or 1 with equal probability, so every policy earns the optimum of 0.5."""

    metadata = {"render_modes": [], "render_fps": 1}  # noqa: RUF012

    def __init__(self, salt: int) -> None:
        self.salt = salt
        self.observation_space = self.action_space = envs.core.FreeText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.coins = np.random.default_rng([self.salt, seed or 0])
        return "go", {}

    def step(self, action):
        # The reward depends on the reply, so that paired differences have a variance.
        side = self.coins.integers(2, size=zlib.crc32(action.encode()) % 7 + 1)[-1]
        return "", float(side), True, False, {}

    def legal_actions(self):
        return ["heads", "tails"]

    def expert(self, rng=None):
        return "heads"

    def optimal_value(self):
        return 0.5


def test_adversary_level_when_all_policies_are_optimal():
    """The rate of false findings is at most the level; a binomial bound at 1 in 1,000."""
    repeats = 40
    findings = sum(bool(successful_adversaries(Coin(salt))) for salt in range(repeats))
    assert ERROR_RATE == 0.01
    assert findings <= 4


def first_texts(env: gym.Env) -> tuple[str | None, frozenset[str]]:
    """The system prompt and the first observations of 60 episodes."""
    task = env.unwrapped
    return task.system_prompt, frozenset(env.reset(seed=seed)[0] for seed in range(60))


def test_settings_that_change_the_optimum_change_the_prompt():
    """All pairs of variants of a task."""
    checked = 0
    for _, group in itertools.groupby(VARIANTS, key=lambda variant: variant[0]):
        rows = []
        for env_id, kwargs in group:
            if kwargs.get("reward") == "proxy":
                continue  # the prompt does not state the reward, by design
            env = gym.make(env_id, **kwargs)
            rows.append((env.unwrapped.optimal_value(), first_texts(env), kwargs))
        for (a, text_a, one), (b, text_b, other) in itertools.combinations(rows, 2):
            if abs(a - b) > 1e-9:
                assert text_a != text_b, (one, other)
                checked += 1
    assert checked > 150


PRICES = ("step_cost", "call_cost", "test_cost", "verify_cost", "cost_limit", "honest",
          "pass_honest", "pass_impostor")  # fmt: skip


@pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=named(VARIANTS))
def test_prompt_states_budgets_and_costs(env_id, kwargs):
    env = gym.make(env_id, **kwargs)
    text, _ = env.reset(seed=0)
    prompts = f"{env.unwrapped.system_prompt} {text}".replace(",", " ").replace(".\n", " ")
    words = {word.strip(".:;()") for word in prompts.split()}
    if env.unwrapped.max_turns > 1 and "Kuhn" not in env_id:
        assert str(env.unwrapped.max_turns) in words
    for name in set(PRICES) & set(kwargs):
        value = kwargs[name]
        assert {f"{value:g}", f"{100 * value:g}%"} & words, name


def test_observations_state_how_an_episode_ended():
    lake = gym.make("text/FrozenLake-v0", slippery=False).unwrapped
    lake.reset(seed=0)
    lake.step("right")
    text, _, done, _, info = lake.step("down")
    assert text == "You drown in the hole at row 2, column 2. 98 turns left."
    assert done
    assert not info["is_success"]
    cliff = gym.make("text/CliffWalking-v0").unwrapped
    cliff.reset(seed=0)
    assert cliff.step("right")[0].startswith("You fall off the cliff. You are at row 4, column 1.")
    kuhn = gym.make("text/KuhnPoker-v0", seat="first").unwrapped
    assert "Any other answer folds." in kuhn.system_prompt
    kuhn.reset(seed=0)
    assert kuhn.step("hm")[1:3] == (-1.0, True)
    board = gym.make("text/TicTacToe-v0").unwrapped
    assert "any other answer loses the turn" in board.system_prompt
