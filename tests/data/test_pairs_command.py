"""`rlhf pairs` and the parts of an episode."""

import pytest

from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.rollout.batch import Rollout
from tests.helpers.models import tiny_model
from tests.helpers.training import assistant, user


def test_an_episode_of_several_turns_is_no_reply_to_the_prompt_of_another_one(tmp_path):
    model, tokenizer = tiny_model(context=1024)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    tree = {
        "output_dir": str(tmp_path / "pairs"),
        "model": {"path": str(tmp_path / "model")},
        "env": {"id": "text/GuessNumber-v0"},
        "rewards": [{"kind": "function", "path": "tests.helpers.training:judge"}],
        "rollout": {"max_new_tokens": 3},
        "prompts": 2,
        "samples": 3,
    }
    with pytest.raises(UserError, match=r"no pair is left.*reply contains a user or system turn"):
        run_command("pairs", tree)


def test_the_opening_of_an_episode_includes_earlier_replies():
    talk = [*user("a"), *assistant("b"), *user("c"), *assistant("d"), *user("e")]
    rollout = Rollout(0, 0, 0, conversation=talk)
    assert rollout.opening == talk
    rollout.append([0], turn=0, logprobs=[0.0])
    assert rollout.opening == talk[:3]
    assert rollout.scored_conversation == talk[:4]
