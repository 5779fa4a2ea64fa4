"""The examples of docs/serving.md run against a server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.serve import ServerLimits
from rlhf.models.rewards import load_rewards
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.serving.app import Server
from rlhf.serving.model import ServedModel
from tests.helpers.documentation import blocks
from tests.helpers.models import tiny_model
from tests.helpers.web import serve_in_thread

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
NAME, URL = "smollm2-135m-instruct", "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url():
    model, tokenizer = tiny_model(context=512)
    engine = ContinuousEngine(model, max_rows=2, open_ended=True)
    served = ServedModel(NAME, model, tokenizer, engine, parallel=2, limits=ServerLimits())
    server = Server(served, load_rewards([{"kind": "length"}]))
    with serve_in_thread(server.app(host="127.0.0.1")) as listener:
        yield listener.url("").rstrip("/")
    server.close()


def test_the_python_example_prints_a_reply_and_a_stream(url):
    (code,) = blocks(PAGE, "py")
    process = subprocess.run(
        [sys.executable, "-c", code.replace(URL, url)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) > 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_request_for_scores_is_answered(url):
    (command,) = [text for text in blocks(PAGE, "bash") if text.startswith("curl")]
    process = subprocess.run(
        ["bash", "-c", command.replace(URL, url)], capture_output=True, text=True, check=False
    )
    assert '"score":' in process.stdout, process.stderr
