"""A reward that fails costs its own scores and nothing else."""

import sys
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.reward_models import EachReward, Reward, Scores, as_reward
from rlhf.reward_models.core import score_copies
from rlhf.reward_models.judge import RatingJudge, endpoint
from rlhf.rollout.batch import Rollout
from rlhf.training.scoring import score_rollouts

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
    "nothing": (lambda conversations: None, "'NoneType' object is not iterable"),
    "nan": (lambda conversations: [float("nan")] * len(conversations), "not finite"),
    "infinite": (lambda conversations: [float("inf")] * len(conversations), "not finite"),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_that_fails_gives_no_score_and_its_reason(kind: str) -> None:
    function, reason = FUNCTIONS[kind]
    scores = as_reward(function, name="mine").score([TALK, TALK])
    assert scores.values == [None, None]
    assert all(reason in str(text) for text in scores.reasons)
    single = EachReward(lambda conversation: function([conversation])[0], name="mine")
    assert single.score([TALK]).values == [None] or kind in ("text", "digits", "mapping", "set")


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
