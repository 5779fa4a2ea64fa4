"""A reward that fails costs its own scores and nothing else."""

import functools
import math
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.reward_models import PerConversationReward, Reward, Scores, as_reward
from rlhf.reward_models.core import score_copies
from rlhf.reward_models.judge import RatingJudge, endpoint
from rlhf.rollout.batch import Rollout
from rlhf.training.scoring import score_rollouts
from tests.helpers.training import online_tree, read_rows

TALK = [{"role": "user", "content": "2+2?", "answer": ["4"]}, {"role": "assistant", "content": "4"}]


def ends(conversations: Any) -> Any:
    sys.exit(0)


def fails(conversations: Any) -> Any:
    raise KeyError("content")


FUNCTIONS = {
    "exit": (ends, "RuntimeError: called sys.exit(0)"),
    "raise": (fails, "KeyError: 'content'"),
    "text": (lambda conversations: ["1"] * len(conversations), "a score is of type str"),
    "digits": (lambda conversations: "1" * len(conversations), "returned a str"),
    "mapping": (lambda conversations: {i: 1.0 for i in range(len(conversations))}, "a dict"),
    "set": (lambda conversations: {float(i) for i in range(len(conversations))}, "a set"),
    "nothing": (lambda conversations: None, "returned a NoneType, not a list of scores"),
    "number": (lambda conversations: 1.0, "returned a float, not a list of scores"),
    "nan": (lambda conversations: [float("nan")] * len(conversations), "not finite"),
    "infinite": (lambda conversations: [float("inf")] * len(conversations), "not finite"),
}


LISTS = ("text", "digits", "mapping", "set", "number")
"""Kinds whose first element is a score."""


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_that_fails_gives_no_score_and_its_reason(kind: str) -> None:
    function, reason = FUNCTIONS[kind]
    scores = as_reward(function, name="mine").score([TALK, TALK])
    assert scores.values == [None, None]
    assert all(reason in str(text) for text in scores.reasons)
    single = PerConversationReward(lambda conversation: function([conversation])[0], name="mine")
    assert single.score([TALK]).values == [None] or kind in LISTS


def edits(conversations: Any) -> Any:
    for conversation in conversations:
        conversation[0]["answer"].append("5")
        conversation[1]["content"] = "changed"
        conversation.pop()
    return [1.0] * len(conversations)


class Edits(Reward):
    name = "edits"

    def score(self, conversations):
        return Scores(edits(conversations))


def reads(conversations: Any) -> Any:
    assert conversations == [TALK]
    return [2.0] * len(conversations)


@pytest.mark.parametrize("editor", [as_reward(edits), Edits()], ids=["function", "class"])
def test_a_reward_cannot_change_what_others_read(editor: Reward) -> None:
    rollout = Rollout(0, 0, 0, tokens=[1], is_action=[True], env_rewards=[0.0])
    rollout.conversation = [{**TALK[0], "answer": ["4"]}, dict(TALK[1])]
    score_rollouts([rollout], rewards=editor + as_reward(reads), gold=editor, env_weight=1.0)
    assert rollout.conversation == TALK
    assert rollout.rewards == [3.0]
    gated = as_reward(reads).gate(editor)
    assert gated.score([rollout.conversation]).values == [2.0]


def test_a_function_that_edits_and_raises_is_called_again_with_the_original() -> None:
    def twice(conversations: Any) -> Any:
        texts = [conversation.pop()["content"] for conversation in conversations]
        return [float(text) for text in texts]

    bad = [{"role": "assistant", "content": "four"}]
    assert as_reward(twice)([TALK, bad]) == [4.0, None]


def test_output_of_a_reward_is_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(conversations: Any) -> Any:
        print("a score")
        return [1.0] * len(conversations)

    assert as_reward(chatty)([TALK]) == [1.0]
    assert capsys.readouterr() == ("", "a score\n")


@pytest.mark.parametrize("result", [[1.0], Scores([1.0])])
def test_a_class_must_return_a_score_for_each_conversation(result: Any) -> None:
    class Short(Reward):
        def score(self, conversations):
            return result

    with pytest.raises(UserError, match="2 conversations"):
        score_copies(Short(), [TALK, TALK])


def test_a_worker_reports_that_its_function_called_exit() -> None:
    from rlhf.reward_models import build

    path = f"{__name__}:ends"
    scores = build({"kind": "function", "path": path, "timeout": 60}).score([TALK])
    assert "SystemExit: 0" in str(scores.reasons[0])


def as_array(conversations: Any) -> Any:
    return np.full(len(conversations), 0.5)


def as_numbers(conversations: Any) -> Any:
    return [np.float32(0.5) for _ in conversations]


def as_tuple(conversations: Any) -> Any:
    return tuple(0.5 for _ in conversations)


def as_tensor(conversations: Any) -> Any:
    import torch

    return torch.full([len(conversations)], 0.5)


@pytest.mark.parametrize("function", [as_array, as_numbers, as_tuple, as_tensor])
@pytest.mark.parametrize("timeout", [None, 60])
def test_arrays_are_lists_of_scores_also_with_a_time_limit(function: Any, timeout: Any) -> None:
    from rlhf.reward_models import build

    spec = {"kind": "function", "path": f"{__name__}:{function.__name__}", "timeout": timeout}
    assert build(spec)([TALK]) == [0.5]


async def later(conversations: Any) -> Any:
    return [1.0] * len(conversations)


class Later:
    async def __call__(self, conversations: Any) -> Any:
        return [1.0] * len(conversations)


@pytest.mark.parametrize("function", [later, functools.partial(later), Later(), Later().__call__])
def test_an_asynchronous_function_is_refused(function: Any) -> None:
    """Its call would return a coroutine, which nothing waits for."""
    with pytest.raises(UserError, match=r"test_foreign.py:\d+\) is defined with async def.*def"):
        as_reward(function, name="mine")


def test_a_judge_that_fails_gives_its_reason() -> None:
    cases: tuple[tuple[Any, str], ...] = (
        (ends, "RuntimeError: called sys.exit(0)"),
        (fails, "KeyError: 'content'"),
        (lambda prompts: [3] * len(prompts), "the answer is of type int"),
        (endpoint("http://127.0.0.1:9/v1", "m", timeout=1.0), "Connection refused"),
    )
    for generate, reason in cases:
        scores = RatingJudge(generate).score([TALK])
        assert scores.values == [None]
        assert reason in str(scores.reasons[0])


@pytest.mark.parametrize("url", ["https://me:secret@host/v1", "https://token@host/v1"])
def test_a_password_in_the_address_of_a_judge_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        endpoint(url, "m")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "score", "reason"),
    [
        (True, 1.0, None),
        (np.float32(0.5), 0.5, None),
        (np.bool_(True), 1.0, None),
        (Decimal("0.5"), 0.5, None),
        (-1e308, -1e308, None),
        (None, None, "no score"),
        (math.inf, None, "not finite"),
        (10**400, None, "not finite"),
        (Decimal("sNaN"), None, "not finite"),
        ("1", None, "a score is of type str"),
        (1j, None, "a score is of type complex"),
        ([1.0], None, "a score is of type list"),
    ],
)
def test_a_score_of_any_type_is_a_finite_float_or_has_a_reason(
    value: Any, score: float | None, reason: str | None
) -> None:
    scores = Scores([value, 2.0], {"r": [value, 2.0]})
    assert scores.values == [score, 2.0] == scores.components["r"]
    assert scores.reasons == [reason, None]


@pytest.mark.parametrize("huge", [1e308, -1e308, 1e13])
@pytest.mark.parametrize("source", ["reward", "environment", "sum"])
def test_an_episode_with_a_huge_reward_is_unscored(huge: float, source: str) -> None:
    def episode(first: float) -> Rollout:
        return Rollout(7, 0, 0, tokens=[1, 2], is_action=[True, True], env_rewards=[first, 0.0])

    rollouts = [episode(huge if source == "environment" else 0.5), episode(0.5)]
    first = {"reward": huge, "environment": 0.0, "sum": huge / 2}[source]
    reward = as_reward(lambda talks: [first, 1.0], name="f")
    if source == "sum":
        reward = reward + as_reward(lambda talks: [huge / 2, 1.0], name="g")
    score_rollouts(rollouts, rewards=reward, gold=None, env_weight=1.0)
    assert math.isnan(rollouts[0].score)
    assert rollouts[0].unscored == f"the reward {huge:.3g} is outside ±1e+12"
    assert rollouts[0].rewards[0] == 0.0
    assert rollouts[1].score == (2.5 if source == "sum" else 1.5)
    assert rollouts[1].unscored is None


def sometimes_huge(conversations: Any) -> list[float]:
    lengths = [len(talk[-1]["content"]) for talk in conversations]
    return [1e308 * (-1) ** (length // 3) if length % 3 else 0.5 for length in lengths]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_training_with_huge_rewards_has_finite_metrics(
    tmp_path: Path, echo_model: Path, algorithm: str
) -> None:
    rewards = [{"kind": "function", "path": "tests.reward_models.test_foreign:sometimes_huge"}]
    shaping = {"max_unscored": 1.0}
    tree = online_tree(tmp_path / "run", echo_model, rewards=rewards, shaping=shaping, num_steps=2)
    run_command(algorithm, tree)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 2
    assert all(0 < row["reward/unscored"] < 1 for row in rows)
    for row in rows:
        row.pop("reward/sometimes_huge")  # the sum of the reward's own values exceeds float64
    assert all(math.isfinite(value) for row in rows for value in row.values())
