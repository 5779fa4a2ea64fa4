"""The requests of `validate` and `push` arrive at a local server that stands for the Hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.export.conftest import Runs
from tests.export.hub_server import HubState, hub_server

ROOT = Path(__file__).parents[2]


def run_export(state: HubState | None, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `rlhf export` in a second process, because HF_ENDPOINT is read at import."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": state.url if state else "http://127.0.0.1:9",
        "HF_TOKEN": "hf_local_token_of_a_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "rlhf", "export", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_an_export_is_checked_and_uploaded(runs: Runs, tmp_path: Path):
    target = tmp_path / "model"
    with hub_server() as state:
        result = run_export(state, str(runs.ppo), str(target), "--push", "owner/model")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(target), f"{state.url}/owner/model"]
    assert [body["repoType"] for body in state.checked[:2]] == ["model", "dataset"]
    assert state.checked[0]["content"] == (target / "README.md").read_text()
    assert state.checked[1]["content"] == (target / "DATA_CARD.md").read_text()
    (created,) = state.created
    assert (created["organization"], created["name"]) == ("owner", "model")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert state.tokens == {"Bearer hf_local_token_of_a_test"}
    uploaded = {**state.files, **{p: state.large[oid] for p, oid in state.large_paths.items()}}
    expected = {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert uploaded == expected
    weights = expected["model.safetensors"]
    assert state.large_paths["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_a_rejected_card_is_one_line_and_nothing_is_written(runs: Runs, tmp_path: Path):
    with hub_server() as state:
        state.reject = '"license" is not valid'
        result = run_export(state, str(runs.sft), str(tmp_path / "a"), "--validate", "true")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith('model card: "license" is not valid')
    assert not (tmp_path / "a").exists()
    assert {path for _, path in state.requests} == {"/api/validate-yaml"}


def test_a_refused_token_keeps_the_export(runs: Runs, tmp_path: Path):
    with hub_server() as state:
        state.status = 401
        result = run_export(state, str(runs.sft), str(tmp_path / "a"), "--push", "owner/model")
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "not uploaded" in line]
    assert "set HF_TOKEN" in line
    assert (tmp_path / "a/README.md").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(runs: Runs, tmp_path: Path):
    result = run_export(None, str(runs.sft), str(tmp_path / "a"), "--validate", "true")
    assert result.returncode == 2
    assert "the Hugging Face Hub cannot be reached" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "a").exists()
