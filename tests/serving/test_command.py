"""`rlhf serve` as a process: its address, its key, signals, and mistakes."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
import yaml

from rlhf.cli.main import main
from rlhf.config.model import ModelSpec
from rlhf.config.serve import ServeConfig
from tests.helpers.models import tiny_model

KEY = "a-key-for-tests-4711"


@contextmanager
def process(*arguments: str, **variables: str) -> Iterator[tuple[Any, str]]:
    """A process of `rlhf serve` and the address that it prints."""
    command = [sys.executable, "-m", "rlhf", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        try:
            line = child.stdout.readline()  # type: ignore[union-attr]
            match = re.search(r"at (http://\S+/v1)$", line)
            if match is None:
                child.kill()
                raise AssertionError(line + child.stderr.read())  # type: ignore[union-attr]
            yield child, match[1]
        finally:
            child.kill()


def client(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)


def save_long_model(folder: Path) -> Path:
    """A tiny model with a long context, so that completions take seconds."""
    model, tokenizer = tiny_model(context=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wait_for_running_completions(url: str, count: int) -> None:
    deadline = time.monotonic() + 60  # only ends a test that would wait for ever
    address = url.removesuffix("/v1") + "/metrics"
    request = Request(address, headers={"Authorization": f"Bearer {KEY}"})
    while f"rlhf_completions_running {count}.0" not in urlopen(request).read().decode():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_lets_running_requests_finish(tmp_path: Path):
    model, tokens = save_long_model(tmp_path / "model"), 700
    words = ["--model.path", str(model), "--name", "tiny"]
    with process(*words, RLHF_API_KEY=KEY) as (child, url):
        api = client(url, KEY)
        body: dict[str, Any] = {"model": "tiny", "prompt": "apple", "max_tokens": tokens, "n": 4}
        body["extra_body"] = {"ignore_eos": True}

        def whole() -> int:
            return api.completions.create(**body).usage.completion_tokens

        def streamed() -> int:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            events = api.completions.create(**options, **body)
            return next(chunk.usage for chunk in events if chunk.usage).completion_tokens

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            results = [pool.submit(whole), pool.submit(streamed)]
            wait_for_running_completions(url, 8)
            child.send_signal(signal.SIGTERM)
            assert [result.result() for result in results] == [4 * tokens, 4 * tokens]
        assert child.wait(timeout=60) == 128 + signal.SIGTERM
        error = child.stderr.read()
        assert "stopped by SIGTERM" in error
        assert "Traceback" not in error
        assert KEY not in error
        with pytest.raises(openai.APIConnectionError):
            api.models.list()


def test_an_open_address_has_a_key_that_is_never_printed():
    words = ["--rewards", "[{kind: length}]", "--host", "0.0.0.0", "--api-key", KEY]
    with process(*words) as (child, url):
        assert [model.id for model in client(url, KEY).models.list().data] == ["reward"]
        with pytest.raises(openai.AuthenticationError):
            client(url).models.list()
        child.send_signal(signal.SIGINT)
        output, error = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT
    assert KEY not in output + error
    assert "Traceback" not in error


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of wrong arguments, which is one line."""
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_API_KEY", raising=False)
    monkeypatch.setenv("RLHF_API_KEY", "")


MISTAKES = [
    ([], "give --model.path, --rewards, or both"),
    (["--model.path", "m", "--host", "0.0.0.0"], "other machines can reach 0.0.0.0: set a key"),
    (["--model.path", "m", "--api-key", "short"], "fewer than 8 characters"),
    (["--model.path", "m", "--api-key", "12345678"], "must be text"),
    (["--model.path", "m", "--api-key", "ключ-ключ"], "not allowed in an HTTP header"),
    (["--model.path", "m", "--port", "70000"], "port must be <= 65535"),
    (["--model.path", "m", "--host", "nowhere.invalid"], "other machines can reach"),
    (["--model.path", "nowhere/at/all"], "nowhere/at/all"),
    (["--rewards", "[{kind: lenght}]"], "length"),
    (["--rewards", "[{kind: length}]", "--name", "x"], "name has no effect without a model"),
    (["--model.path", "m", "--reward_name", "x"], "reward_name has no effect without rewards"),
    (["--model.path", "m", "--model.lora.rank", "8"], "adds untrained adapters"),
    (["--model.path", "m", "--rollout.engine.kind", "vllm"], "rollout.engine.urls"),
    (["--model.path", "m", "--limits.queue", "-1"], "limits.queue must be >= 0"),
    (["--model.path", "m", "--limits.max_token", "5"], "'max_tokens'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(capsys, arguments, message):
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/ppo/final", "final"), ("owner/tiny", "tiny"), (".", "here"), ("sub/..", "here")],
)
def test_the_name_of_a_model_is_that_of_its_folder(tmp_path, monkeypatch, path, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert ServeConfig(ModelSpec(path=path)).model_name == name


def test_a_port_in_use_is_one_line(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, "--rewards", "[{kind: length}]", "--port", port)
    assert "cannot listen" in line


def test_a_file_must_not_contain_the_key_and_print_config_hides_it(tmp_path: Path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"rewards": [{"kind": "length"}], "api_key": KEY}))
    line = refused(capsys, "--config", str(file))
    assert line.startswith("rlhf: api_key: ")
    assert KEY not in line
    words = ["serve", "--rewards", "[{kind: length}]", "--api-key", KEY, "--print-config"]
    assert main(words) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["api_key"] is None
    assert shown["limits"]["max_tokens"] == 2048
