"""Mistakes of users are one line with exit code 2, before a model replies."""

from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.common.files import write_jsonl
from tests.chat.conftest import Checkpoints

BASE, LORA = "{base}", "{lora}"
RATING = {"label_id": "1", "item_id": "2", "mode": "ratings", "annotator": "ann", "rating": 4,
          "prompt": [{"role": "user", "content": "Q"}],
          "completion": [{"role": "assistant", "content": "A"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give at least one model"),
        (["runs/nowhere/final"], "unknown model 'runs/nowhere/final'"),
        ([BASE, "{base}/../base"], "is given twice"),
        (["{root}"], "it contains the runs lora"),
        ([BASE, "--blind"], "give at least two models"),
        ([BASE, "--labels", "votes.jsonl"], "give at least two models"),
        ([BASE, LORA, "--labels", "votes.csv"], "suffix .jsonl"),
        ([BASE, LORA, "--labels", "{root}/rows.jsonl"], "is not a label"),
        ([BASE, LORA, "--labels", "{ratings}"], "has labels of mode ratings, not pairs"),
        ([BASE, "--port", "80"], "port has no effect on interface: terminal"),
        ([BASE, "--port", "70000"], "port must be <= 65535"),
        ([BASE, "--env.id", "text/Nowhere-v0"], "text/Nowhere"),
        ([BASE, "--env.id", "text/Echo-v0", "--env.errors", "count"], "no effect in a chat"),
        ([BASE, "--rewards", "[{kind: lenth}]"], "did you mean 'length'"),
        ([BASE, "--rollout.temperature", "-1"], "rollout.temperature must be >= 0"),
        ([BASE, "--rollout.chat", "true", "--rollout.stop", "x"], "rollout.stop has no effect"),
        ([BASE, "--rollout.parallel", "3"], "rollout.parallel has no effect in a chat"),
        ([BASE, "--rollout.separator", "x"], "the chat template ends turns"),
        ([BASE, "--rollout.invalid", "retry"], "rollout.invalid has no effect"),
        (
            [BASE, "--env.id", "text/GuessNumber-v0", "--rollout.invalid_reward", "-1"],
            "rollout.invalid_reward has no effect",
        ),
        ([BASE] * 9, "at most 8 models"),
    ],
)
def test_a_mistake_is_one_line(
    checkpoints: Checkpoints, arguments: list[str], reason: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"base": checkpoints.paths[0], "lora": checkpoints.paths[1]}
    places["root"] = str(Path(places["base"]).parent)
    places["ratings"] = str(tmp_path.with_name("ratings.jsonl"))
    write_jsonl(places["ratings"], [RATING])
    words = [word.format(**places) if word.startswith("{") and ":" not in word else word
             for word in arguments]  # fmt: skip
    assert main(["chat", *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf:")]
    assert len(errors) == 1, errors
    assert reason in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_page_needs_its_extra(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["chat", checkpoints.paths[0], "--interface", "page"]) == 2
    assert 'pip install "rlhf-kit[web]"' in capsys.readouterr().err


def test_help_names_the_settings(capsys: pytest.CaptureFixture[str]):
    assert main(["chat", "--help"]) == 0
    text = capsys.readouterr().out
    for key in ("models", "blind", "labels", "interface", "env.id", "rewards", "rollout.system"):
        assert f"--{key} " in text
    assert "--rollout.max_new_tokens INT>=1 = 256\n" in text
