"""The reasoning-gym adapter; skipped without the extra."""

import random
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlhf.envs.adapters.reasoning_gym import NOT_OFFERED, ReasoningGym, tasks
from rlhf.envs.check import MALFORMED_REPLIES

pytest.importorskip("reasoning_gym")

SLOW_TO_DRAW = {"arc_agi", "figlet_font", "futoshiki", "intermediate_integration", "knight_swap"}


@pytest.fixture(autouse=True)
def _foreign_resource_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(task: str, **kwargs) -> ReasoningGym:
    return gym.make("text/ReasoningGym-v0", task=task, size=20, **kwargs).unwrapped


def test_at_least_a_hundred_tasks_are_available():
    assert len(tasks()) >= 100
    assert not set(tasks()) & set(NOT_OFFERED)


@pytest.mark.slow
def test_every_task_gives_one_question_per_seed_and_pays_its_reference_answer():
    paid, silent = set(), set()
    for task in tasks():
        state = random.getstate(), repr(np.random.get_state())
        env = make(task)
        question, info = env.reset(seed=3)
        assert (question, info) == env.reset(seed=3), task
        assert question == make(task).reset(seed=3)[0], task
        try:
            answer = env.best_action()
        except NotImplementedError:
            silent.add(task)
        else:
            _, reward, done, truncated, step = env.step(answer)
            assert (reward, done, truncated, step["is_success"]) == (1.0, True, False, True), task
            paid.add(task)
        assert (random.getstate(), repr(np.random.get_state())) == state, task
    assert len(paid) >= 99
    assert len(silent) <= 5


@pytest.mark.slow
def test_no_scorer_raises_or_accepts_malformed_answers():
    """Malformed answers that equal the reference (`-1`, `[]`) are skipped."""
    for task in sorted(set(tasks()) - SLOW_TO_DRAW):
        env = make(task)
        env.reset(seed=1)
        for text in (text for text in MALFORMED_REPLIES if len(text) < 100):
            if text.strip() not in str(env._entry.get("answer")) or not text.strip():
                _, reward, _, _, info = env.step(text)
                assert reward == 0.0, (task, text)
                assert 0.0 <= info["score"] <= 1.0, (task, text)


WRAPPED = ["not {}", "The answer is not {}", "{} or 7", "7 or {}", "{} or X", "1 2 3 {}"]
WRAPPED += ["{} and 7", "{} is wrong", "maybe {}", "either {} or 7"]
KNOWN_TO_PAY = ["gsm_symbolic", "kakurasu", "knights_knaves", "letter_jumble", "quantum_lock"]
KNOWN_TO_PAY += ["survo", "sokoban", "spell_backward", "simple_integration", "countdown"]
KNOWN_TO_PAY += ["polynomial_multiplication", "puzzle24", "coin_flip", "chain_sum", "aiw", "acre"]


def audit(task: str) -> None:
    """The right answer has full reward; with text around it or a changed digit it has less."""
    env = make(task, partial=True)
    for seed in range(3):
        env.reset(seed=seed)
        try:
            answer = env.best_action()
        except NotImplementedError:
            return
        assert env.step(answer)[1] == 1.0, (task, seed, answer)
        for form in WRAPPED:
            text = form.format(answer)
            if answer.strip():
                assert env.step(text)[1] == 0.0, (task, seed, text)
        if re.fullmatch(r"-?\d+", answer):
            changed = answer[:-1] + ("3" if answer[-1] != "3" else "8")
            assert env.step(changed)[1] < 1.0, (task, seed, changed)


@pytest.mark.parametrize("task", KNOWN_TO_PAY)
def test_wrapped_answers_earn_nothing(task):
    audit(task)


@pytest.mark.sweep
def test_wrapped_answers_earn_nothing_in_any_task():
    for task in tasks():
        audit(task)


def test_an_answer_to_another_question_earns_nothing():
    """The answer must use the numbers of the question; 24 can be made of many numbers."""
    env = make("puzzle24")
    answers = []
    for seed in range(6):
        env.reset(seed=seed)
        answers.append(env.best_action())
    for seed, own in enumerate(answers):
        env.reset(seed=seed)
        numbers = sorted(re.findall(r"\d+", own))
        for answer in answers:
            same_numbers = sorted(re.findall(r"\d+", answer)) == numbers
            assert env.step(answer)[1] == float(same_numbers), (own, answer)
        assert env.step(f"({own})*1")[1] == env.step("24")[1] == 0.0


@pytest.mark.parametrize("task", ["chain_sum", "list_functions", "pool_matrix", "word_ladder"])
def test_gymnasium_checker_is_silent(task):
    env = make(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


def test_train_and_test_items_are_disjoint():
    train, test = make("chain_sum"), make("chain_sum", split="test")
    seen = {env: {env.reset(seed=s)[0] for s in range(18)} for env in (train, test)}
    assert len(seen[train]) == 18
    assert len(seen[test]) == 2
    assert not seen[train] & seen[test]


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("game_of_life_halting", "banana"),
        ("game_of_life_halting", " "),
        ("coin_flip", "0"),
        ("coin_flip", "1e999"),
        ("complex_arithmetic", "nan"),
        ("prime_factorization", "("),
        ("boxnet", "1"),
        ("rectangle_count", "0"),
        ("gcd", "-1"),
    ],
)
def test_known_scorer_bugs_are_closed(task, wrong):
    env = make(task)
    for seed in range(5):
        env.reset(seed=seed)
        _, reward, _, _, info = env.step(wrong)
        assert reward == 0.0
        assert isinstance(info["reason"], str)


def test_partial_credit_is_optional():
    exact, partial = make("time_intervals"), make("time_intervals", partial=True)
    differs = False
    for seed in range(18):
        exact.reset(seed=seed)
        partial.reset(seed=seed)
        paid = partial.step("1 day")[1]
        differs |= 0.0 < paid < 1.0
        assert exact.step("1 day")[1] in (0.0, 1.0)
    assert differs


def test_unknown_tasks_and_settings_are_refused():
    with pytest.raises(ValueError, match="did you mean 'chain_sum'"):
        make("chainsum")
    with pytest.raises(ValueError, match="not offered"):
        make("composite")
    with pytest.raises(ValueError, match="does not accept"):
        make("chain_sum", config={"colour": "red"})


REPEATING = ("string_splitting", "string_synthesis", "tower_of_hanoi", "coin_flip",
             "self_reference", "prime_factorization", "acre", "chain_sum")  # fmt: skip
"""Tasks that include ones with repeated questions."""


@pytest.mark.parametrize("task", REPEATING)
def test_no_question_of_the_test_split_is_in_training(task):
    def questions(split, seeds):
        env = ReasoningGym(task, split=split, size=300 if task == "acre" else 1000)
        return {" ".join(env.reset(seed=seed)[0].casefold().split()) for seed in seeds}

    train = questions("train", range(400))
    test = questions("test", range(2**30, 2**30 + 100))
    assert len(train) > 20
    assert len(test) > 10
    assert not train & test


def test_a_task_with_one_question_cannot_be_split():
    one = ReasoningGym("chain_sum", size=20)
    one._dataset_entry_at = lambda index: {"question": "always this", "answer": "1"}  # type: ignore[method-assign]
    other = ReasoningGym("chain_sum", size=20, split="test")
    other._dataset_entry_at = one._dataset_entry_at  # type: ignore[method-assign]
    refused = 0
    for env in (one, other):
        env._key = ("constant", env.split)  # type: ignore[assignment]
        try:
            env.reset(seed=0)
        except ValueError as error:
            refused += "too few questions" in str(error)
    assert refused == 1


@pytest.mark.sweep
def test_splits_of_all_tasks_have_disjoint_questions():
    for task in sorted(set(tasks()) - SLOW_TO_DRAW - {"sokoban", "zebra_puzzles", "puzzle24"}):
        count = 25 if task in ("quantum_lock", "sudoku", "countdown", "number_sequence") else 100
        sides = []
        for split, first in (("train", 0), ("test", 2**30)):
            env = ReasoningGym(task, split=split)
            texts = (env.reset(seed=first + seed)[0] for seed in range(count))
            sides.append({" ".join(text.casefold().split()) for text in texts})
        assert not sides[0] & sides[1], task
        assert min(map(len, sides)) > 10, task


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("gsm_symbolic", "-{}"),
        ("gsm_symbolic", "{}%"),
        ("kakurasu", "-{}"),
        ("kakurasu", "5{}"),
        ("kakurasu", "{}5"),
        ("spell_backward", "{}x"),
        ("spell_backward", "{}{}"),
        ("tower_of_hanoi", "x{}"),
        ("tower_of_hanoi", "{} or not"),
    ],
)
def test_no_part_of_an_answer_is_ignored(task, wrong):
    env = make(task)
    for seed in range(5):
        env.reset(seed=seed)
        answer = env.best_action()
        assert env.step(answer)[1] == 1.0
        assert env.step(wrong.format(answer, answer))[1] == 0.0


@pytest.mark.parametrize("task", ["kakurasu", "survo", "pool_matrix", "time_intervals"])
def test_words_between_those_of_the_reference_earn_nothing(task):
    env = make(task)
    for seed in range(5):
        env.reset(seed=seed)
        first, *others = re.split(r"(\s)", env.best_action(), maxsplit=1)
        assert env.step("".join([first, *others]))[1] == 1.0
        if others:
            assert env.step("".join([first, " banana", *others]))[1] == 0.0


def test_a_longer_word_ladder_is_right():
    """It contains all words of the reference and some that the question does not name."""
    env = make("word_ladder")
    env.reset(seed=0)
    metadata = {"start_word": "COLD", "end_word": "CARD"}
    env._entry = {"question": "COLD to CARD", "answer": "COLD,CORD,CARD", "metadata": metadata}
    assert env.step("COLD,CORD,CARD")[1] == env.step("COLD,CORD,WORD,WARD,CARD")[1] == 1.0
    for wrapped in ("COLD,CORD,CARD or 7", "not COLD,CORD,CARD", "COLD,CORD,banana,CARD"):
        assert env.step(wrapped)[1] == 0.0


def test_a_small_probability_is_not_any_small_number():
    """Two to the power of -13 is 0.0001220703125; the library accepts errors of 0.0001."""
    env = make("coin_flip")
    env.reset(seed=0)
    env._entry = {"question": "Exactly 0 heads in 13 coin flips?", "answer": "0.0001220703125"}
    scores = [env.step(reply)[1] for reply in ("0.0001220703125", "1/8192", "0.000122")]
    assert scores == [1.0] * 3
    assert [env.step(reply)[1] for reply in ("0.0002", "0.00003", "0.0001")] == [0.0] * 3


def test_partial_credit_of_a_misspelled_word():
    env = make("spell_backward", partial=True)
    env.reset(seed=0)
    env._entry = {"question": "Spell this word backward: stop", "answer": "pots"}
    scores = [env.step(reply)[1] for reply in ("pots", "pott", "potss", "")]
    assert scores == [1.0, 0.75, 0.8, 0.0]


def test_programs_of_questions_leave_no_files(tmp_path, monkeypatch, capsys):
    """Item 448 of the library writes a file, item 994 prints the reason why it failed."""
    monkeypatch.chdir(tmp_path)
    env = ReasoningGym("codeio", size=1000, split="all")
    questions = [env._dataset_entry_at(item)["question"] for item in (448, 994)]
    assert all(questions)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert env._dataset_entry_at(994)["answer"] == "{}"
    assert env._first_index_in_split(994) != 994
