"""Configuration of the rollout engine of online training."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any

from rlhf.common.ranges import PositiveFloat, Seconds
from rlhf.common.registry import OneOf, Registry

_MODULE = "rlhf.training.online_setup"

ENGINES: Registry[str | Callable[..., Any] | None] = Registry(
    "engine", {"local": None, "vllm": f"{_MODULE}:open_vllm_engine"}
)
"""Name of the engine -> function, or its name ``module:name``, that creates a `RolloutEngine` from
the model and the configuration of the run; None for the engine in this process.
`rlhf.plugins.register_engine` adds an engine."""
EngineName = Annotated[str, OneOf(ENGINES)]


@dataclass(frozen=True)
class EngineSpec:
    """Rollout engine: this process (local), vLLM servers (vllm), or an engine of a plug-in."""

    kind: EngineName = "local"
    """local: this process; vllm: one or more vLLM servers (docs/engines.md). Plug-ins can add
    engines."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the engine of a plug-in."""
    urls: list[str] = field(default_factory=list)
    """Addresses of the servers, such as http://localhost:8000. If a server needs a key, set the
    environment variable VLLM_API_KEY."""
    folder: str | None = None
    """Folder for the weights of the policy, on a disk that the servers can read under the same
    path. The default is output_dir with the suffix -engine."""
    request_timeout: Seconds = 300.0
    """Time limit of a request to a server, in seconds."""
    retry_seconds: Seconds = 300.0
    """Time for which a request is repeated if the servers do not answer, in seconds. Then the run
    stops with a checkpoint."""
    tolerance: PositiveFloat = 0.1
    """Maximum mean absolute difference, in nats, between the log-probabilities of a server and of
    the trainer, on fixed tokens and on a sampled reply to them. The differences are checked after
    each update of the weights."""
    executable: str = "python"
    """Python interpreter with vLLM, with which `rlhf engine start` starts a server."""
    arguments: list[str] = field(default_factory=list)
    """Additional arguments with which `rlhf engine start` starts a server, e.g.
    [--enforce-eager]."""
    start_seconds: Seconds = 600.0
    """Time that `rlhf engine start` waits for the first answer of a server, in seconds."""

    def __post_init__(self) -> None:
        used = {"local": {"kind"}, "vllm": _SERVER_KEYS | {"kind"}}
        for item in fields(self):
            factory = item.default_factory
            default = item.default if factory is MISSING else factory()
            keys = used.get(self.kind, {"kind", "options"})
            if getattr(self, item.name) != default and item.name not in keys:
                raise ValueError(
                    f"rollout.engine.{item.name} has no effect with rollout.engine.kind {self.kind}"
                )
        if self.kind != "vllm":
            return
        if not self.urls:
            raise ValueError("rollout.engine.urls: give the address of at least one vLLM server")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("rollout.engine.urls: the addresses must differ")
        for url in self.urls:
            _check_url(url)


_SERVER_KEYS = {item.name for item in fields(EngineSpec)} - {"kind", "options"}
"""Keys of the vLLM servers."""


def _check_url(url: str) -> None:
    """Raise ValueError if a URL is not an address of a server, or has a user name or a password."""
    if "@" in url:
        raise ValueError(
            "rollout.engine.urls contains a user name or a password, which would be saved in the "
            "run directory; set the environment variable VLLM_API_KEY instead"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        valid = valid and not (parts.query or parts.fragment)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"rollout.engine.urls: {url!r} is not an address such as http://localhost:8000"
        )
