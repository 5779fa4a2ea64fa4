"""Implements `rlhf engine start`, which starts the vLLM servers of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config.online import OnlineConfig
from rlhf.errors import UserError

_MODEL = "model"
"""Name of the folder of the model in the engine's folder."""
_MARKER = ".rlhf-engine"
"""File in the folder of the model, so that only a folder of this command is replaced."""


def start_vllm_servers(config: OnlineConfig) -> Iterator[str]:
    """Start a server for each address in ``rollout.engine.urls``; yield a line when it answers.

    The servers continue when the command has ended. They serve the initial model of the run, which
    is saved in the engine's folder with the output of the servers.

    Raises:
        UserError: ``rollout.engine.kind`` is not vllm, an address is in use, the engine's folder
            cannot be replaced, or a server does not start.
    """
    from rlhf.rollout.vllm.server import (
        is_answering,
        server_command,
        start_server,
        stop_server,
        wait_until_ready,
    )
    from rlhf.training.online_setup import published_weights_folder

    spec = config.rollout.engine
    if spec.kind != "vllm":
        raise UserError(f"rollout.engine.kind is {spec.kind}: set it to vllm to start a server")
    for url in spec.urls:
        if is_answering(url):
            raise UserError(f"a program already answers at {url}")
    folder = published_weights_folder(config).absolute()
    _check_folder_is_replaceable(folder / _MODEL)
    model, context, dtype = _save_model_with_context_and_dtype(config, folder)
    started = []
    try:
        for index, url in enumerate(spec.urls):
            command = server_command(config, url, model=model, context=context, dtype=dtype)
            log = folder / f"server-{index}.log"
            started.append((url, log, start_server(command, log=log)))
        for url, log, process in started:
            wait_until_ready(process, url, log=log, seconds=spec.start_seconds)
            yield f"ready: {url} (process {process.pid}, output {log})"
    except BaseException:
        for _, _, process in started:
            stop_server(process)
        raise


def _check_folder_is_replaceable(folder: Path) -> None:
    """Check that a folder does not exist, or that an earlier `rlhf engine start` wrote it.

    Raises:
        UserError: The folder has other content or was changed, or it cannot be created.
    """
    from rlhf.runs.checksums import check_folder_is_unchanged
    from rlhf.runs.claim import check_output_path

    check_output_path(folder, option="rollout.engine.folder")
    if folder.exists():
        check_folder_is_unchanged(folder, _MARKER, "a model that `rlhf engine start` saved")


def _save_model_with_context_and_dtype(config: OnlineConfig, folder: Path) -> tuple[Path, int, str]:
    """Save the initial model of a run, or only the base model if the run trains adapters.

    Returns:
        The folder of the model, its context length in tokens, and its data type.
    """
    from rlhf.common.files import add_path_to_write_errors, atomic_path
    from rlhf.models.adapters import base_weights
    from rlhf.models.architecture import context_length_of, unwrap_peft
    from rlhf.models.loading import load_model
    from rlhf.rollout.vllm.weights import save_with_untied_head
    from rlhf.runs.checksums import write_file_list

    model: Any
    model, tokenizer = load_model(config.model, seed=config.seed)
    target = folder / _MODEL
    with add_path_to_write_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            if unwrap_peft(model) is model:
                save_with_untied_head(model, partial)
            else:
                unwrap_peft(model).save_pretrained(partial, state_dict=base_weights(model))
            tokenizer.save_pretrained(partial)
            write_file_list(partial, _MARKER)
    return target, context_length_of(model), str(model.dtype).removeprefix("torch.")
