"""A server whose completions are sampled by a vLLM server, through the same protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config.load import build_config
from rlhf.config.serve import ServeConfig
from rlhf.rollout.vllm.weights import save_with_untied_head
from rlhf.serving.app import Server
from rlhf.serving.model import load_served_model
from tests.helpers.models import recomputed_logprobs, scratch_model, tiny_tokenizer
from tests.helpers.vllm_server import FakeVLLM
from tests.helpers.web import serve_in_thread
from tests.serving.conftest import Running


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("vllm")
    save_with_untied_head(scratch_model(), folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    fake = FakeVLLM(folder / "base")
    engine = {"kind": "vllm", "urls": [fake.url], "folder": str(folder / "weights")}
    tree = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "name": "tiny",
        "rollout": {"engine": engine, "parallel": 2},
    }
    model = load_served_model(build_config(ServeConfig, tree))
    server = Server(model, None)
    with serve_in_thread(server.app(host="127.0.0.1")) as listener:
        yield Running(server, listener)
    server.close()
    fake.kill()


def test_completions_have_the_tokens_and_log_probabilities_of_the_vllm_server(behind):
    model = behind.server.completions.model
    text = "Which colour"
    response = behind.openai().completions.create(
        model="tiny",
        prompt=text,
        n=3,
        max_tokens=8,
        logprobs=0,
        extra_body={"return_token_ids": True},
    )
    assert len({choice.text for choice in response.choices}) > 1
    for choice in response.choices:
        ids = choice.prompt_token_ids + choice.token_ids
        expected = recomputed_logprobs(model.model, ids)[len(choice.prompt_token_ids) :]
        assert choice.logprobs.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        decoded = model.tokenizer.decode(choice.token_ids, skip_special_tokens=True)
        assert choice.text == decoded


def test_a_stop_string_is_applied_to_the_whole_completion(behind):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 20, "temperature": 0}
    whole = behind.post("/v1/completions", body)[1]["choices"][0]["text"]
    stop = whole[3:5]
    short = behind.post("/v1/completions", {**body, "stop": stop})[1]["choices"][0]
    assert short["text"] == whole[: whole.index(stop)]
    assert short["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        ("/v1/completions", {"prompt": "a", "stream": True}, "stream"),
        ("/v1/completions", {"prompt": "a", "logprobs": 2}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "logprobs": 0, "echo": True}, "logprobs"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1},
            "top_logprobs",
        ),
    ],
)
def test_options_that_need_the_engine_of_the_process_are_refused(behind, path, options, param):
    status, answer = behind.post(path, {"model": "tiny", **options})
    assert (status, answer["error"]["param"]) == (400, param)
    assert "rollout.engine.kind local" in answer["error"]["message"]


def test_the_weights_need_a_folder(tmp_path: Path):
    tree = {
        "model": {"path": "x"},
        "rollout": {"engine": {"kind": "vllm", "urls": ["http://localhost:8000"]}},
    }
    with pytest.raises(ValueError, match=r"rollout\.engine\.folder"):
        build_config(ServeConfig, tree)
