"""The route for scores, and a served model as a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.models.rewards import load_rewards
from rlhf.reward_models.judge import endpoint, rating_judge
from tests.helpers.models import tiny_model
from tests.helpers.training import write_rows
from tests.reward_models.conftest import save_decoder
from tests.serving.conftest import running

TALKS = [
    [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word * 3}]
    for word in ("seven", "blue")
]


def served_scores(rewards, conversations) -> list[dict]:
    with running(reward=load_rewards(rewards)) as server:
        status, answer = server.post(
            "/v1/score", {"model": "reward", "conversations": conversations}
        )
    assert status == 200, answer
    assert answer["model"] == "reward"
    assert [row["index"] for row in answer["data"]] == list(range(len(conversations)))
    return answer["data"]


def test_scores_of_a_reward_model_equal_rlhf_score(tmp_path: Path, capsys):
    save_decoder(tmp_path / "reward")
    rewards = [{"kind": "learned", "path": str(tmp_path / "reward")}, {"kind": "length"}]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in TALKS])
    assert main(["score", "--rewards", json.dumps(rewards), "--input", str(data)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, line in zip(served_scores(rewards, TALKS), lines, strict=True):
        assert row["score"] == pytest.approx(line["score"], abs=1e-5)
        assert row["components"] == pytest.approx(line["components"], abs=1e-5)
        assert row["reason"] is None


def test_a_conversation_without_a_score_has_a_reason():
    known = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    known[0]["answer"] = "4"
    unknown = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    first, second = served_scores([{"kind": "number"}], [known, unknown])
    assert (first["score"], first["reason"]) == (1.0, None)
    assert second["score"] is None
    assert "no reference answer" in second["reason"]


def test_wrong_requests_for_scores_are_refused():
    with running(reward=load_rewards([{"kind": "length"}]), conversations=2) as server:
        body = {"model": "reward", "conversations": TALKS[:1]}
        assert server.post("/v1/score", body)[0] == 200
        for change, status, message in [
            ({"conversations": []}, 400, "at least one conversation"),
            ({"conversations": [[{"role": "user"}]]}, 400, "a content"),
            ({"conversations": TALKS[:1] * 3}, 400, "limited to 2"),
            ({"model": "tiny"}, 404, "the model 'tiny' is not among those of /v1/score: reward"),
            ({"stream": True}, 400, "unknown option 'stream'"),
        ]:
            found, answer = server.post("/v1/score", {**body, **change})
            assert found == status
            assert message in answer["error"]["message"]
        assert server.post("/v1/completions", {"model": "x", "prompt": "a"})[0] == 404
        (model,) = server.request("/v1/models")[1]["data"]
        assert model["id"] == "reward"


@pytest.mark.parametrize("depth", [40, 500, 900])
def test_deeply_nested_messages_are_refused(depth: int):
    nested = "[" * depth + "]" * depth
    body = (
        '{"model": "reward", "conversations": [[{"role": "user", "content": "a", "answer": %s}]]}'
    )
    with running(reward=load_rewards([{"kind": "length"}])) as server:
        status, error = server.post("/v1/score", (body % nested).encode())
        assert status == 400
        assert "nested at most 32" in error["error"]["message"]
        assert server.post("/v1/score", (body % ("[" * 20 + "]" * 20)).encode())[0] == 200


def test_a_served_model_is_a_judge():
    model, tokenizer = tiny_model(context=512)
    with running(model, tokenizer) as server:
        prompts = ["Which colour is the sky?", "Say a number."]
        answers = endpoint(server.url, "tiny", max_tokens=20)(prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            reply = server.openai().chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=20,
            )
            assert answer == reply.choices[0].message.content
    # The tiny model gives no rating; the judge receives its answer and says so.
    model, tokenizer = tiny_model(context=2048)
    with running(model, tokenizer) as server:
        scores = rating_judge(server.url, "tiny").score(TALKS[:1])
    assert scores.reasons == ["judge: no rating in answer"]


def test_a_judge_rates_with_a_served_model(monkeypatch):
    """The model's reply is replaced, because no tiny model writes ratings."""
    model, tokenizer = tiny_model(context=2048)
    from rlhf.rollout.text_decoder import IncrementalTextDecoder

    monkeypatch.setattr(IncrementalTextDecoder, "append", lambda self, ids: "")
    monkeypatch.setattr(IncrementalTextDecoder, "finish", lambda self: "It is right. Rating: 10")
    with running(model, tokenizer) as server:
        scores = rating_judge(server.url, "tiny").score(TALKS[:1])
    assert scores.values == [1.0]
