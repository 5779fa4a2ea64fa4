"""Implements `rlhf serve`, an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.http import json_headers
from rlhf.common.imports import check_extra_installed
from rlhf.config.load import ConfigSource, assemble_tree_and_load_plugins, build_config
from rlhf.config.serve import ServeConfig
from rlhf.errors import UserError
from rlhf.web import WEB_PACKAGES

API_KEY_VARIABLE = "RLHF_API_KEY"
"""Environment variable with the API key of the server."""
MIN_KEY_LENGTH = 8
"""Minimum number of characters of an API key. Shorter values are not masked in logs."""


def move_api_key_to_environment_and_read_config(
    sources: Sequence[ConfigSource], overrides: Sequence[tuple[str, Any]], commands: CommandTable
) -> ServeConfig:
    """Build the configuration. An API key in `overrides` is moved to the environment variable.

    The configuration can be printed and is therefore free of the API key.

    Raises:
        UserError: A configuration key or a value is invalid, or a file contains the API key.
    """
    for value in (value for name, value in overrides if name == "api_key"):
        if not isinstance(value, str) or not value:
            raise UserError(f"--api_key must be text; to use only digits, set {API_KEY_VARIABLE}")
        os.environ[API_KEY_VARIABLE] = value
    rest = [(name, value) for name, value in overrides if name != "api_key"]
    return build_config(ServeConfig, assemble_tree_and_load_plugins(sources, rest))


def serve(config: ServeConfig) -> Iterator[str]:
    """Serve until a signal ends the server; yield the address.

    Raises:
        UserError: The API key, the model, a reward or the address cannot be used.
        Interrupted: A signal stopped the server.
    """
    check_extra_installed("rlhf serve", "serve", *WEB_PACKAGES, "prometheus_client")
    from rlhf.models.rewards import load_rewards
    from rlhf.serving.app import Server
    from rlhf.serving.model import load_served_model
    from rlhf.web.server import open_listener
    from rlhf.web.server import serve as serve_app

    key = _api_key_for_host(config.host)
    listener = open_listener(config.host, config.port)  # before the model, which takes longer
    try:
        model = None if config.model is None else load_served_model(config)
        reward = load_rewards(config.rewards) if config.rewards else None
        server = Server(model, reward, reward_name=config.reward_name, limits=config.limits)
    except BaseException:
        listener.socket.close()
        raise
    app = server.app(host=config.host, api_key=key)
    try:
        yield f"serving {_served_names_text(config)} at {listener.url('/v1')}"
        serve_app(
            app,
            listener,
            graceful_seconds=config.limits.shutdown_seconds,
            unread_seconds=config.limits.seconds,
        )
    finally:
        server.close()


def _served_names_text(config: ServeConfig) -> str:
    """Return the names of the model and of the rewards."""
    model = [] if config.model is None else [config.model_name]
    return " and ".join([*model, *([config.reward_name] if config.rewards else [])])


def _api_key_for_host(host: str) -> str:
    """Return the API key, or "" if there is none and only this machine can reach the address.

    Raises:
        UserError: The API key is missing, too short, or cannot be part of a header.
    """
    from rlhf.web.server import is_loopback

    json_headers(API_KEY_VARIABLE)  # refuses characters that a header cannot contain
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if key and len(key) < MIN_KEY_LENGTH:
        raise UserError(f"the key has fewer than {MIN_KEY_LENGTH} characters; choose a longer one")
    if not key and not is_loopback(host):
        raise UserError(
            f"other machines can reach {host}: set a key in the environment variable "
            f"{API_KEY_VARIABLE} or with --api-key, or use --host 127.0.0.1"
        )
    return key
