"""Start vLLM servers for a training run, in an environment that contains vLLM."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.parse
from pathlib import Path

from rlhf.config.model import LoraSpec
from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError
from rlhf.rollout.vllm.client import PROBE_SECONDS, Client, ServerRefusal, ServerUnavailable

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank that vLLM accepts."""
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # enables /v1/load_lora_adapter
    "VLLM_SERVER_DEV_MODE": "1",  # enables /collective_rpc and /reset_prefix_cache
}


def server_command(
    config: OnlineConfig, url: str, *, model: Path, context: int, dtype: str
) -> list[str]:
    """Return the command of a server.

    Args:
        config: Configuration of the run.
        url: Address of the server.
        model: Folder of the initial model; of the base model, if the run trains adapters.
        context: Context length of the model, in tokens.
        dtype: Data type of the weights.

    Raises:
        UserError: The rank of the adapters is larger than vLLM supports.
    """
    parts = urllib.parse.urlsplit(url)
    arguments = {
        "--model": str(model),
        "--served-model-name": "policy",
        "--host": parts.hostname or "localhost",
        "--port": str(parts.port or (443 if parts.scheme == "https" else 80)),
        "--max-model-len": str(context),
        "--dtype": dtype,
        # By default, the log-probabilities are those before the division by the temperature.
        "--logprobs-mode": "processed_logprobs",
        # By default, the generation configuration of the model sets sampling parameters.
        "--generation-config": "vllm",
    }
    words = [word for pair in arguments.items() for word in pair]
    if config.model.lora is not None:
        words += [
            "--enable-lora",
            "--max-lora-rank",
            str(_smallest_sufficient_max_rank(config.model.lora)),
        ]
        words += ["--max-loras", "2"]  # the previous and the new adapter during an update
    spec = config.rollout.engine
    module = "vllm.entrypoints.openai.api_server"
    return [spec.executable, "-m", module, *words, *spec.arguments]


def _smallest_sufficient_max_rank(lora: LoraSpec) -> int:
    ranks = [rank for rank in _LORA_RANKS if rank >= lora.rank]
    if not ranks:
        raise UserError(f"model.lora.rank: vLLM supports at most {_LORA_RANKS[-1]}")
    return ranks[0]


def start_server(command: list[str], *, log: Path) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, so that it continues when this process ends.

    Args:
        command: The command.
        log: File for the output of the server.

    Raises:
        UserError: The executable does not exist or cannot be run.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"rollout.engine.executable: {command[0]!r} is not an executable; set the path of a "
            "Python interpreter whose environment contains vLLM"
        )
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )


def wait_until_ready(
    process: subprocess.Popen[bytes], url: str, *, log: Path, seconds: float
) -> None:
    """Wait until a server answers.

    Args:
        process: Process of the server.
        url: Address of the server.
        log: File with the output of the server, for the error message.
        seconds: Time limit.

    Raises:
        UserError: The process ended, the server did not answer within the time limit, or another
            program answers. In the last two cases, the process is ended.
    """
    client = Client(url, timeout=PROBE_SECONDS)
    deadline = time.monotonic() + seconds
    while True:
        if process.poll() is not None:
            raise UserError(
                f"the server at {url} ended with exit code {process.returncode}; its output is in "
                f"{log}"
            )
        try:
            client.get("/v1/models")
            return
        except ServerUnavailable as error:
            if time.monotonic() > deadline:
                stop_server(process)
                raise UserError(
                    f"the server at {url} did not answer within {seconds:g} s "
                    f"(rollout.engine.start_seconds); its output is in {log}"
                ) from error
        except ServerRefusal as error:
            stop_server(process)
            raise UserError(f"another program answers at {url}: {error}") from error
        time.sleep(0.5)


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End the process of a server."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_answering(url: str) -> bool:
    """Return whether a program accepts connections at the address."""
    client = Client(url, timeout=PROBE_SECONDS)
    try:
        client.start_restart_detection()
    except ServerUnavailable:
        return False
    client.close()
    return True
