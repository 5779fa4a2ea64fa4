"""Optimal and random values, each compared with an independent method."""

import itertools
from fractions import Fraction
from functools import cache

import gymnasium as gym
import numpy as np
import pytest

from rlhf import envs
from rlhf.envs import key_door, kuhn_poker, tictactoe
from rlhf.envs.bandit import Bandit
from rlhf.envs.guess_number import GuessNumber
from rlhf.envs.key_door import KeyDoor
from rlhf.envs.kuhn_poker import KuhnPoker
from rlhf.envs.tictactoe import TicTacToe
from rlhf.envs.tmaze import TMaze
from rlhf.envs.tool_lookup import ToolLookup
from rlhf.envs.wordle import Wordle, letter_marks

VALUED = [name for name in envs.TASKS if name != "Prompts-v0"]


def play(env, policy, seeds) -> np.ndarray:
    """Returns of a policy (a function of the environment) over seeded episodes."""
    returns = []
    for seed in seeds:
        env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(policy(env))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    return np.array(returns)


def assert_mean(returns: np.ndarray, expected: float) -> None:
    """Assert that the sample mean is within four standard errors."""
    error = max(returns.std() / len(returns) ** 0.5, 1e-9)
    assert abs(returns.mean() - expected) < 4 * error, (returns.mean(), expected, error)


@pytest.mark.parametrize("name", VALUED)
def test_experts_reach_the_optimum_and_random_policies_the_random_value(name):
    env = gym.make(f"text/{name}").unwrapped
    rng = np.random.default_rng(0)
    assert_mean(play(env, lambda e: e.expert(), range(500)), env.optimal_value())
    assert_mean(play(env, lambda e: e.sample_action(rng), range(1500)), env.random_value())


# Support's action values are priced (reward minus price times cost); see test_more_known_values.
@pytest.mark.parametrize("name", [name for name in VALUED if name != "Support-v0"])
def test_action_values_agree_with_the_optimal_value_at_the_start(name):
    """The mean over starts of max_a Q is V*, exactly for few starts."""
    env = gym.make(f"text/{name}").unwrapped
    best = []
    for seed in range(300):
        env.reset(seed=seed)
        values = env.action_values()
        assert set(values) == set(env.legal_actions())
        best.append(max(values.values()))
    assert_mean(np.array(best), env.optimal_value())


def test_bandit_by_exact_recursion_over_histories():
    @cache
    def value(history: tuple[tuple[int, int], ...]) -> Fraction:
        if len(history) == 4:
            return Fraction(0)
        options = []
        for arm in range(2):
            pays = [paid for pulled, paid in history if pulled == arm]
            chance = Fraction(sum(pays) + 1, len(pays) + 2)
            win, lose = value((*history, (arm, 1))), value((*history, (arm, 0)))
            options.append(chance * (1 + win) + (1 - chance) * lose)
        return max(options)

    assert Bandit(2, 4).optimal_value() == pytest.approx(float(value(())))
    env = Bandit()
    assert env.optimal_value() == pytest.approx(6.41, abs=0.005)
    references = env.reference_values()
    assert env.random_value() < references["greedy"] < env.optimal_value() < references["oracle"]


@pytest.mark.parametrize(("numbers", "guesses"), [(20, 4), (7, 2), (8, 4), (3, 1)])
def test_number_guessing_by_counting_the_leaves_of_a_binary_tree(numbers, guesses):
    expected = min(numbers, 2**guesses - 1) / numbers
    assert GuessNumber(numbers, guesses).optimal_value() == pytest.approx(expected)


def test_number_guessing_consistent_policy_by_simulation():
    env, rng = GuessNumber(), np.random.default_rng(0)

    def consistent(e):
        return str(rng.integers(e._low, e._high + 1))

    assert_mean(play(env, consistent, range(3000)), env.reference_values()["consistent"])


def test_wordle_marks_by_hand():
    assert letter_marks("speed", "abide") == "--y-y"
    assert letter_marks("speed", "erase") == "y-yy-"
    assert letter_marks("speed", "speed") == "ggggg"
    assert letter_marks("allow", "llama") == "ygy--"
    assert letter_marks("geese", "eagle") == "yy--g"


def test_wordle_by_plain_search_over_strategies():
    env = Wordle(words=12, guesses=2)

    def wins(words: tuple[str, ...], left: int) -> int:
        if not words or left == 0:
            return 0
        best = 0
        for guess in env.words:
            groups: dict[str, list[str]] = {}
            for word in words:
                groups.setdefault(letter_marks(guess, word), []).append(word)
            found = sum(
                1 if marks == "ggggg" else wins(tuple(group), left - 1)
                for marks, group in groups.items()
            )
            best = max(best, found)
        return best

    for guesses in (1, 2):
        expected = wins(env.words, guesses) / len(env.words)
        assert Wordle(words=12, guesses=guesses).optimal_value() == pytest.approx(expected)
    assert Wordle(words=5, guesses=3).optimal_value() == wins(Wordle(words=5).words, 3) / 5


def test_tmaze_values_by_transition_matrix_and_by_simulation():
    env = TMaze(length=3, steps=7)
    walk = np.diag([2 / 3] * 3 + [1 / 3]) + np.diag([1 / 3] * 3, k=1)
    arrivals = [np.linalg.matrix_power(walk, t)[0, 3] for t in range(7)]
    assert env.random_value() == pytest.approx(sum(arrivals) / 3)
    assert TMaze().random_value() == pytest.approx(0.071, abs=0.001)
    best = 0.0
    for start_left, start_right, inside, junction in itertools.product(
        ("forward", "left", "right"), repeat=4
    ):
        seen = {"The sign says left": start_left, "The sign says right": start_right}
        returns = []
        for seed in (0, 1, 2, 3, 4, 5):
            text, _ = env.reset(seed=seed)
            done = False
            while not done:
                default = junction if "junction" in text else inside
                text, reward, done, _, _ = env.step(seen.get(text.split(".")[0], default))
            returns.append((env._sign, reward))
        share = [np.mean([r for sign, r in returns if sign == s]) for s in ("left", "right")]
        best = max(best, float(np.mean(share)))
    assert best == 0.5 == env.reference_values()["memoryless"]


def test_key_door_optimum_by_manhattan_distances():
    """Two open rectangles are joined by one door, so paths are sums of distances."""

    def apart(a, b):
        return abs(a[0] - b[0]) + abs(a[1] - b[1])

    for size in (3, 5):
        lengths = [
            apart(start, key) + apart(key, door) + apart(door, goal)
            for start, key, door, goal in key_door.all_layouts(size)
        ]
        assert KeyDoor(size).optimal_value() == pytest.approx(1 - 0.01 * np.mean(lengths))


def test_tool_lookup_by_search_over_sets_of_possible_registers():
    people, rooms, cost = 3, 2, 0.1
    names = ("ada", "ben", "cleo")
    managers = itertools.product((1, 2), (0, 2), (0, 1))
    worlds = frozenset(itertools.product(managers, itertools.product(range(rooms), repeat=people)))

    @cache
    def value(possible: frozenset, left: int, hops: int) -> float:
        if left == 0:
            return 0.0
        options = []
        for room in range(rooms):
            right = sum(r[0 if hops == 1 else m[0]] == room for m, r in possible)
            options.append(right / len(possible))
        for person in range(people):
            groups: dict[tuple, set] = {}
            for m, r in possible:
                groups.setdefault((m[person], r[person]), set()).add((m, r))
            after = (len(g) * value(frozenset(g), left - 1, hops) for g in groups.values())
            options.append(sum(after) / len(possible) - cost)
        return max(options)

    for hops in (1, 2):
        env = ToolLookup(hops, people, rooms, cost)
        assert env.people == names
        assert env.optimal_value() == pytest.approx(value(worlds, hops + 2, hops))
    assert ToolLookup().optimal_value() == pytest.approx(1 - 2 * 0.05)
    assert ToolLookup(call_cost=0.9).optimal_value() == pytest.approx(0.1)


def test_the_prompt_of_tool_lookup_states_that_a_reply_is_one_command():
    env = ToolLookup()
    env.reset(seed=0)
    *_, info = env.step("lookup ada\nlookup ben")
    assert not info["valid"]
    assert "Each reply is one command" in env.system_prompt


def test_kuhn_game_value_by_solving_the_matrix_game():
    """The normal form has 64 x 64 pure strategies; linear programming finds its value."""
    optimize = pytest.importorskip("scipy.optimize")
    deals = list(itertools.permutations(range(3), 2))
    pures = list(itertools.product((0, 1), repeat=6))  # (on 3 cards at one node) + (at another)

    def chips(first, second, a, b):
        high = 1 if a > b else -1
        if first[a]:  # bet
            return 2 * high if second[b] else 1
        if not second[3 + b]:
            return high
        return 2 * high if first[3 + a] else -1

    matrix = np.array(
        [[np.mean([chips(f, s, a, b) for a, b in deals]) for s in pures] for f in pures]
    )
    rows, columns = matrix.shape
    solution = optimize.linprog(
        c=[0] * rows + [-1],
        A_ub=np.hstack([-matrix.T, np.ones((columns, 1))]),
        b_ub=np.zeros(columns),
        A_eq=[[1] * rows + [0]],
        b_eq=[1],
        bounds=[(0, 1)] * rows + [(None, None)],
    )
    assert -solution.fun == pytest.approx(-1 / 18, abs=1e-9)
    # A best response to the opponent earns exactly the game's value: the opponent is optimal.
    assert KuhnPoker(seat="first").optimal_value() == pytest.approx(-1 / 18)
    assert KuhnPoker(seat="second").optimal_value() == pytest.approx(1 / 18)


def test_kuhn_values_against_a_random_opponent():
    assert KuhnPoker("random", "first").optimal_value() == pytest.approx(0.5)
    assert KuhnPoker("random", "second").optimal_value() == pytest.approx(5 / 12)
    assert KuhnPoker("random", "first").random_value() == pytest.approx(0.125)


def test_kuhn_self_play_between_equilibria_has_the_game_value():
    """The opponent is a function that plays the equilibrium from its own observations."""
    rng = np.random.default_rng(0)

    def snapshot(conversation):
        observations = [m["content"] for m in conversation if m["role"] == "user"]
        card = next(card for card in kuhn_poker.CARDS if card in observations[0])
        last = observations[-1]
        history = "" if "says" not in last else "c" if "check" in last.split("?")[0] else "b"
        if len(observations) == 2:
            history = "cb"
        elif "says check" in last:
            history = "c"
        bets = rng.random() < kuhn_poker.EQUILIBRIUM[history][card]
        words = kuhn_poker.LEGAL_WORDS_BY_HISTORY[history]
        return words[1 if "bet" in words else 0] if bets else words[0 if "bet" in words else 1]

    env = KuhnPoker(snapshot, "first")

    def nash(e):
        bets = rng.random() < kuhn_poker.EQUILIBRIUM[e._history][e._card]
        words = e.legal_actions()
        return words[1 if "bet" in words else 0] if bets else words[0 if "bet" in words else 1]

    assert_mean(play(env, nash, range(4000)), -1 / 18)
    with pytest.raises(ValueError, match="is a function"):
        env.optimal_value()


def test_tictactoe_by_independent_recursion():
    wins = [sum(1 << i for i in line) for line in tictactoe.WINNING_LINES]

    @cache
    def value(mine: int, theirs: int, my_turn: bool, best: bool) -> float:
        for sign, side in ((1.0, mine), (-1.0, theirs)):
            if any(side & w == w for w in wins):
                return sign
        moves = [1 << i for i in range(9) if not (mine | theirs) >> i & 1]
        if not moves:
            return 0.0
        if my_turn:
            after = [value(mine | m, theirs, False, best) for m in moves]
            return max(after) if best else sum(after) / len(after)
        return sum(value(mine, theirs | m, True, best) for m in moves) / len(moves)

    for seat, starts in (("first", True), ("second", False)):
        env = TicTacToe("random", seat)
        assert env.optimal_value() == pytest.approx(value(0, 0, starts, True))
        assert env.random_value() == pytest.approx(value(0, 0, starts, False))
    assert TicTacToe("random", "first").optimal_value() == pytest.approx(0.995, abs=5e-4)
    assert TicTacToe("random", "first").random_value() == pytest.approx(0.297, abs=5e-3)


def test_kuhn_opponent_with_an_invalid_first_reply_checks():
    """An episode cannot end at reset, so the invalid reply does not fold."""
    env = KuhnPoker(lambda conversation: "no idea", "second")
    text, _ = env.reset(seed=0)
    assert "Your opponent says check. check or bet?" in text
    text, chips, done, _, _ = env.step("bet")
    # The invalid second reply folds, so the agent wins the ante.
    assert (text.startswith("Your opponent says fold."), chips, done) == (True, 1.0, True)


def test_tictactoe_optimal_opponent_draws_with_perfect_play():
    env = TicTacToe("optimal")
    assert env.optimal_value() == 0.0
    assert play(env, lambda e: e.expert(), range(50)).tolist() == [0.0] * 50
    rng = np.random.default_rng(0)
    assert play(env, lambda e: e.sample_action(rng), range(200)).max() == 0.0


def test_tictactoe_opponent_may_be_a_function():
    def lowest(conversation):
        board = conversation[-1]["content"].split("\n", 1)[1]
        return min(cell for cell in board.split() if cell.isdigit())

    env = TicTacToe(lowest, "first")
    env.reset(seed=0)
    text, *_ = env.step("5")
    assert text == "Your opponent plays 1.\no 2 3\n4 x 6\n7 8 9"
    mute = TicTacToe(lambda conversation: "pass", "first")
    mute.reset(seed=0)
    assert mute.step("1")[0].startswith("Your opponent loses a turn.")
    mute.step("2")
    assert mute.step("3")[1:3] == (1.0, True)
