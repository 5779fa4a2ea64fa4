"""Keys, tokens and passwords reach no file, page or log line."""

import logging
import sys

import pytest

from rlhf.cli.main import main
from rlhf.common.text import SafeLogFormatter, mask_secret_options, mask_secrets
from rlhf.config.load import assemble_tree_and_load_plugins
from rlhf.errors import UserError
from rlhf.runs.machine import describe_machine

SECRETS = {
    "rewards.0.url": "https://me:hunter2-hunter2@host:8000/v1",
    "rewards.0.address": "http://host/v1?api_key=hunter2-hunter2",
    "rewards.0.api_key": "hunter2-hunter2",
    "rewards.0.options.password": "hunter2-hunter2",
    "rewards.0.headers.X-Api-Key": "hunter2-hunter2",
    "rewards.0.headers.Cookie": "hunter2-hunter2",
    "rewards.0.accessToken": "hunter2-hunter2",
    "rewards.0.passphrase": "hunter2-hunter2",
    "rewards.0.pem": "-----BEGIN RSA PRIVATE KEY-----\nhunter2",
    "rewards.0.jwt": "eyJhunter2hunter2.eyJhunter2hunter2.hunter2",
    "rewards.0.blob": "https://host/blob?sv=1&sig=hunter2-hunter2",
    "trainer.hub_token": "hunter2-hunter2",
    "data.0.header": "Bearer hunter2-hunter2",
    "model.path": "sk-hunter2-hunter2hunter2",
}


@pytest.mark.parametrize(("key", "value"), SECRETS.items())
def test_a_secret_in_a_configuration_is_refused_by_its_key(key: str, value: str):
    sources = [{"rewards": [{}], "data": [{}]}]
    with pytest.raises(UserError) as caught:
        assemble_tree_and_load_plugins(sources, [(key, value)])
    assert str(caught.value).startswith(f"{key}: ")
    assert "hunter2" not in str(caught.value)


def test_settings_that_look_alike_are_accepted():
    settings = {"eos_token": "<|im_end|>", "max_tokens": 5, "token_budget": "x", "api_key": ""}
    settings |= {"url": "http://localhost:8000/v1", "path": "user@host/x", "key": "a/b:c@d"}
    assert assemble_tree_and_load_plugins([settings], []) == settings


def test_a_refused_secret_leaves_no_directory(tmp_path, capsys: pytest.CaptureFixture):
    out = tmp_path / "run"
    url = SECRETS["rewards.0.url"]
    words = ["ppo", "--output_dir", str(out), "--rewards", f"[{{kind: judge, url: '{url}'}}]"]
    assert main(words) == 2
    assert "rewards.0.url" in capsys.readouterr().err
    assert not out.exists()


def test_the_recorded_command_line_has_no_secrets(monkeypatch: pytest.MonkeyPatch):
    words = ["train.py", "--judge.api-key", "hunter2", "--hf_token=hunter2", "--seed", "3"]
    words += [SECRETS["rewards.0.url"], "--eos_token", "<end>"]
    monkeypatch.setattr(sys, "argv", words)
    assert describe_machine()["command"] == [
        "train.py",
        "--judge.api-key",
        "***",
        "--hf_token=***",
        "--seed",
        "3",
        "https://***@host:8000/v1",
        "--eos_token",
        "<end>",
    ]
    assert mask_secret_options(["x", "--token", "--seed", "1"]) == ["x", "--token", "--seed", "1"]


def test_log_lines_and_values_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "plain-words-only")
    record = logging.LogRecord("x", 20, "", 0, "sent plain-words-only", (), None)
    assert SafeLogFormatter("%(message)s").format(record) == "sent ***"
    assert mask_secrets("see http://host/a?b=1#c, a@b.org") == "see http://host/a?b=1#c, a@b.org"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Authorization: Basic bWU6aHVudGVyMg==", "Authorization: Basic ***"),
        ("{'authorization': 'Token hunter2hunter2'}", "{'authorization': 'Token ***'}"),
        ("X-Api-Key: hunter2hunter2, Accept: */*", "X-Api-Key: ***, Accept: */*"),
        ('{"api_key": "hunter2hunter2"}', '{"api_key": "***"}'),
        ("LLM_API_KEY=hunter2hunter2", "LLM_API_KEY=***"),
        ("https://me:hunter2@hunter2@host/v1", "https://***@host/v1"),
        ("https://me:hun/ter#2@host/v1", "https://***@host/v1"),
        ("https:/me:hunter2@host/v1", "https:/***@host/v1"),
        ("http://host:8000/v1/me@home", "http://host:8000/v1/me@home"),
        ("http://[::1]:8000/me@home", "http://[::1]:8000/me@home"),
        ("a file:/home/me@home/x", "a file:/home/me@home/x"),
        ("http://host/a?pass=hunter2&b=1", "http://host/a?pass=***&b=1"),
        ("http://host/a?X-Amz-Signature=hunter2", "http://host/a?X-Amz-Signature=***"),
        ("rewards.0.api_key: contains a secret", "rewards.0.api_key: contains a secret"),
    ],
)
def test_headers_and_urls_are_masked(text: str, masked: str):
    assert mask_secrets(text) == masked


NAMES = ["GITHUB_TOKEN", "AWS_SESSION_TOKEN", "PGPASSWORD", "TOGETHER_KEY", "DB_PASS", "MY_SECRET"]


@pytest.mark.parametrize("name", NAMES)
def test_values_of_secret_variables_are_masked(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "plain/words=only\udcff")
    assert mask_secrets("a plain/words=only\udcff, plain%2Fwords%3Donly%3F") == "a ***, ***"


@pytest.mark.parametrize("name", ["PWD", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PASSENGERS"])
def test_values_of_other_variables_are_not_masked(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "plain-words-only")
    assert mask_secrets("a plain-words-only") == "a plain-words-only"


def test_an_existing_path_is_not_a_secret(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    assert mask_secrets(f"{tmp_path}/run") == f"{tmp_path}/run"
