"""Publish the weights of the policy for servers, and check that a server uses them.

A publication is a folder with a unique name. A LoRA policy is published as an adapter, which a
server loads under this name. The names must be unique, because the prefix cache of a server
identifies an adapter by its name. For other policies, all weights are published, and the server's
weights are replaced.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlhf.common.files import add_path_to_write_errors, read_json
from rlhf.errors import UserError
from rlhf.models.architecture import text_config, unwrap_peft
from rlhf.models.comparison import evaluation_mode
from rlhf.rollout.vllm.client import Client, ServerRefusal, ServerUnavailable

PROBE_TOKENS = 160
"""Maximum number of fixed tokens of the check. It is larger than a block of vLLM's prefix cache."""
PROBE_REPLY_TOKENS = 8
"""Number of tokens that a server samples in the check."""
_NOISE_FACTOR = 4.0
"""An update is measurable if it changes the log-probabilities of the fixed tokens by more than
this factor times the difference between the server and the trainer before the update."""


@dataclass(frozen=True)
class PublishedWeights:
    """Weights of the policy in a folder."""

    name: str
    folder: Path
    is_adapter: bool
    logprobs: np.ndarray
    """Log-probabilities of the fixed tokens at temperature 1 under these weights."""


class WeightPublisher:
    """Writes publications and computes the trainer's log-probabilities.

    Args:
        model: The policy's model.
        folder: Folder of the publications.
        context_length: Context length of the model, in tokens.
        temperature: Sampling temperature of the rollouts.
    """

    def __init__(
        self, model: Any, folder: Path, *, context_length: int, temperature: float
    ) -> None:
        self.model, self.folder, self.temperature = model, folder, temperature
        self.is_adapter = unwrap_peft(model) is not model
        self.vocab_size = int(text_config(unwrap_peft(model)).vocab_size)
        self.current: PublishedWeights | None = None
        length = max(2, min(PROBE_TOKENS, context_length - PROBE_REPLY_TOKENS - 1))
        self.probe_ids = np.random.default_rng(0).integers(self.vocab_size, size=length).tolist()
        self._lock = threading.Lock()
        self._prefix, self._count = f"policy-{uuid.uuid4().hex[:8]}", 0

    def publish(self) -> PublishedWeights:
        """Write the current weights; return the publication, which becomes ``current``.

        Raises:
            OSError: The folder cannot be written; the file name of the error is its path.
        """
        self._count += 1
        name = f"{self._prefix}-{self._count}"
        target = (self.folder / name).absolute()
        with add_path_to_write_errors(target):
            target.mkdir(parents=True)
            if self.is_adapter:
                self.model.save_pretrained(
                    target, selected_adapters=["default"], save_embedding_layers=False
                )
            else:
                save_with_untied_head(self.model, target)
        logprobs = self.token_logprobs(self.probe_ids, temperature=1.0)
        self.current = PublishedWeights(name, target, self.is_adapter, logprobs)
        return self.current

    def remove(self, publication: PublishedWeights) -> None:
        """Delete the folder of a publication that no server uses any more."""
        shutil.rmtree(publication.folder, ignore_errors=True)

    @torch.no_grad()
    def token_logprobs(self, tokens: list[int], *, temperature: float) -> np.ndarray:
        """Return the log-probabilities of tokens 1, 2, ... of a sequence under the current weights.

        Args:
            tokens: T token ids.
            temperature: Divisor of the logits; 0 is treated as 1.
        """
        ids = torch.tensor([tokens], device=self.model.device)
        with self._lock, evaluation_mode(self.model):
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (temperature or 1.0)
        selected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return selected.double().cpu().numpy()


class ServedPolicy:
    """The weights that one server has loaded.

    Args:
        client: Client of the server.
        publisher: Publishes the weights.
        tolerance: Maximum mean absolute difference of log-probabilities in nats.
    """

    def __init__(self, client: Client, publisher: WeightPublisher, *, tolerance: float) -> None:
        self.client, self.publisher, self.tolerance = client, publisher, tolerance
        self.base_name = ""
        self.logprob_gap = float("nan")
        """Mean absolute difference of the fixed tokens' log-probabilities at the last check, in
        nats."""
        self._loaded: PublishedWeights | None = None
        self._checked: PublishedWeights | None = None
        """The publication that the server used at the last check."""
        self._served: np.ndarray | None = None
        """Log-probabilities of the fixed tokens at the last check."""
        self._adapters: list[str] = []
        """Names of the adapters that the server may have. The answer to a request that loads or
        unloads an adapter can be lost."""

    @property
    def is_current(self) -> bool:
        """Whether the server uses the current publication and did not restart."""
        return self._loaded is self.publisher.current and not self.client.restarted()

    @property
    def model_name(self) -> str:
        """Name of the policy in requests."""
        assert self._loaded is not None
        return self._loaded.name if self._loaded.is_adapter else self.base_name

    def mark_not_loaded(self) -> None:
        """Mark the weights as not loaded, so that they are loaded before the next request."""
        self._loaded, self._checked, self._served = None, None, None

    def unload(self) -> None:
        """Unload the adapters, if the server has any and answers."""
        if not self.client.restarted():
            with contextlib.suppress(ServerUnavailable, ServerRefusal):
                self._unload_adapters_except(None)
        self.mark_not_loaded()

    def load(self) -> None:
        """Load the current publication into the server, and check that the server uses it.

        Raises:
            ServerUnavailable: The server does not answer.
            UserError: The server is not a vLLM server or refuses the weights, or its
                log-probabilities differ from those of the trainer.
        """
        publication = self.publisher.current
        assert publication is not None
        if self.client.restarted():
            self.mark_not_loaded()
            self._adapters.clear()
            self.client.start_restart_detection()
        self._loaded = None
        self.base_name = self._find_base_name()
        if publication.is_adapter:
            self._load_adapter(publication)
        else:
            self._load_full_weights(publication)
        self._check_served_logprobs(publication)
        self._loaded = publication

    def _find_base_name(self) -> str:
        """Return the name of the model that the server was started with.

        Raises:
            UserError: The server lists no model.
        """
        try:
            return next(name for name, is_adapter in self._list_models().items() if not is_adapter)
        except StopIteration:
            raise UserError(
                f"{self.client.url} is not a vLLM server: /v1/models lists no model"
            ) from None

    def _list_models(self) -> dict[str, bool]:
        """Return name -> whether it is an adapter, for all models of the server; {} if unknown."""
        answer = self.client.get("/v1/models")
        try:
            return {str(row["id"]): bool(row.get("parent")) for row in answer["data"]}
        except (TypeError, KeyError, AttributeError):
            return {}

    def _load_adapter(self, publication: PublishedWeights) -> None:
        """Load an adapter, and unload all others of this run.

        A server refuses a name that it has. Names are unique, so it has loaded the adapter in an
        earlier attempt, whose answer was lost or which failed later.

        Raises:
            UserError: The server refuses the adapter and does not have it.
        """
        body = {"lora_name": publication.name, "lora_path": str(publication.folder)}
        if publication.name not in self._adapters:
            self._adapters.append(publication.name)
        try:
            self.client.post("/v1/load_lora_adapter", body)
        except ServerRefusal as error:
            if publication.name not in self._list_models():
                raise UserError(
                    f"{error} (start the server with --enable-lora, a sufficient --max-lora-rank "
                    "and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; it must find the folder under the "
                    "same path)"
                ) from error
        self._unload_adapters_except(publication.name)

    def _unload_adapters_except(self, kept_name: str | None) -> None:
        """Unload the adapters of this run, except the one with the name ``kept_name``."""
        for name in [name for name in self._adapters if name != kept_name]:
            try:
                self.client.post("/v1/unload_lora_adapter", {"lora_name": name})
            except ServerRefusal as error:
                if error.status != 404:
                    raise
            self._adapters.remove(name)

    def _load_full_weights(self, publication: PublishedWeights) -> None:
        """Replace all weights, and empty the prefix cache, which was computed with the old ones.

        Raises:
            ServerUnavailable: The prefix cache is in use.
            UserError: The server refuses a request.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(publication.folder)}}
        try:
            self.client.post("/collective_rpc", body)
            answer = self.client.post("/reset_prefix_cache")
        except ServerRefusal as error:
            raise UserError(
                f"{error} (start the server with VLLM_SERVER_DEV_MODE=1; it must find the folder "
                "under the same path)"
            ) from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerUnavailable(
                f"{self.client.url}: the prefix cache is in use by requests of another client"
            )

    def _check_served_logprobs(self, publication: PublishedWeights) -> None:
        """Compare log-probabilities of the server and of the trainer.

        Raises:
            UserError: The mean absolute difference exceeds the tolerance, or the server's
                log-probabilities are closer to those of the previous weights.
        """
        url = self.client.url
        name = publication.name if publication.is_adapter else self.base_name
        served = self._fixed_token_logprobs(name)
        self.logprob_gap = _mean_absolute_difference(served, publication.logprobs)
        if not self.logprob_gap <= self.tolerance:
            raise UserError(
                f"{url} does not serve the current policy: its log-probabilities of fixed tokens "
                f"differ from those of the trainer by {self.logprob_gap:.1e} nats on average "
                f"(rollout.engine.tolerance {self.tolerance:g}); the server needs the initial "
                "model of the run and a dtype of the same precision"
            )
        previous = self._checked
        if previous is not None and self._served is not None:
            noise = _mean_absolute_difference(self._served, previous.logprobs)
            moved = _mean_absolute_difference(publication.logprobs, previous.logprobs)
            stale = _mean_absolute_difference(served, previous.logprobs)
            if moved > _NOISE_FACTOR * noise and stale < self.logprob_gap:
                raise UserError(
                    f"{url} still serves the previous policy: its log-probabilities of fixed "
                    f"tokens differ from those of the new weights by {self.logprob_gap:.1e} nats "
                    f"on average, and from those of the previous weights by {stale:.1e}"
                )
        self._check_sampled_logprobs(name)
        self._checked, self._served = publication, served

    def _check_sampled_logprobs(self, model_name: str) -> None:
        """Check the log-probabilities of tokens that are sampled after the fixed tokens.

        The server computes log-probabilities of sampled tokens with the prefix cache and the
        temperature of the rollouts, but log-probabilities of a prompt without them.

        Args:
            model_name: Name of the policy in requests.

        Raises:
            UserError: The mean absolute difference from the trainer exceeds the tolerance.
        """
        publisher = self.publisher
        body = completion_request_body(
            model_name,
            publisher.probe_ids,
            max_tokens=PROBE_REPLY_TOKENS,
            temperature=publisher.temperature,
            seed=0,
        )
        answer = self.client.post("/v1/completions", body)
        tokens, logprobs = read_completion(
            answer, self.client.url, publisher.probe_ids, PROBE_REPLY_TOKENS, publisher.vocab_size
        )
        expected = publisher.token_logprobs(
            [*publisher.probe_ids, *tokens], temperature=publisher.temperature
        )[-len(tokens) :]
        gap = _mean_absolute_difference(np.array(logprobs), expected)
        if not gap <= self.tolerance:
            raise UserError(
                f"{self.client.url} does not serve the current policy: its log-probabilities of "
                f"sampled tokens differ from those of the trainer by {gap:.1e} nats on average "
                f"(rollout.engine.tolerance {self.tolerance:g}); start the server with "
                "--logprobs-mode processed_logprobs"
            )

    def _fixed_token_logprobs(self, model_name: str) -> np.ndarray:
        """Return the server's log-probabilities of the fixed tokens, from the second one on.

        Raises:
            UserError: The response does not contain them.
        """
        probe = self.publisher.probe_ids
        body = completion_request_body(model_name, probe, max_tokens=1, temperature=1.0, seed=0)
        answer = self.client.post("/v1/completions", {**body, "prompt_logprobs": 0})
        try:
            rows = answer["choices"][0]["prompt_logprobs"][1:]
            return np.array(
                [row[str(token)]["logprob"] for row, token in zip(rows, probe[1:], strict=True)],
                dtype=np.float64,
            )
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{self.client.url} returned no log-probabilities of the prompt"
            ) from error


def save_with_untied_head(model: Any, folder: Path) -> None:
    """Save a model so that vLLM can replace all its weights.

    If the output head shares the weight of the embedding, the weight is saved twice, and
    ``tie_word_embeddings`` is false in the configuration. When vLLM 0.32 reloads a tied model, it
    replaces the embedding but keeps the old output head.
    """
    model.save_pretrained(folder)
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    weight, single_file = head.weight.detach().contiguous(), folder / "model.safetensors"
    if single_file.exists():
        # The loaded tensors may be mapped from the file, so it is replaced and not overwritten.
        partial = folder / "partial"
        save_file({**load_file(single_file), name: weight}, partial, metadata={"format": "pt"})
        partial.replace(single_file)
    else:
        file, index = "model-head.safetensors", folder / "model.safetensors.index.json"
        save_file({name: weight}, folder / file, metadata={"format": "pt"})
        content = read_json(index)
        content["weight_map"][name] = file
        index.write_text(json.dumps(content))
    path = folder / "config.json"
    config = read_json(path)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2))


def _mean_absolute_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


def completion_request_body(
    model_name: str,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    """Return the JSON of a request to ``/v1/completions``.

    All parameters of the distribution are set, because a server otherwise uses those in the
    generation configuration of its model.
    """
    return {
        "model": model_name,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "n": 1,
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "ignore_eos": True,  # only stop_token_ids end a completion
        "stop_token_ids": sorted(stop_ids),
    }


def read_completion(
    answer: Any, url: str, prompt: list[int], max_tokens: int, vocab_size: int
) -> tuple[list[int], list[float]]:
    """Return the tokens and log-probabilities of a response of ``/v1/completions``.

    Raises:
        ServerUnavailable: The server aborted the request.
        UserError: The response is invalid or does not match the request.
    """
    try:
        choice = answer["choices"][0]
        reason, tokens = choice["finish_reason"], choice["token_ids"]
        logprobs = (choice["logprobs"] or {}).get("token_logprobs")
        echoed = choice.get("prompt_token_ids")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{url} returned no completion with token ids (vLLM 0.32 is supported)"
        ) from error
    if reason == "abort":
        raise ServerUnavailable(f"{url}: the server aborted a request")
    if reason not in ("stop", "length"):
        raise UserError(f"{url} returned a completion with the finish reason {reason!r}")
    if echoed is not None and echoed != list(prompt):
        raise UserError(f"{url} sampled a completion of a prompt that was not requested")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= max_tokens:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise UserError(f"{url} returned {count} tokens, expected 1 to {max_tokens}")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"{url} returned the token id {token!r}, which is not in the vocabulary"
            )
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        count = len(logprobs) if isinstance(logprobs, list) else "no"
        raise UserError(f"{url} returned {len(tokens)} tokens with {count} log-probabilities")
    for value in logprobs:
        # vLLM writes -9999 for a log-probability of minus infinity.
        if type(value) not in (int, float) or not -9999 < value <= 1e-3:
            raise UserError(f"{url} returned the log-probability {value!r}")
    return tokens, [float(value) for value in logprobs]
