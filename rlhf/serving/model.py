"""A language model that a server offers: its tokenizer, its engine and its limits."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config.serve import ServeConfig, ServerLimits
from rlhf.errors import UserError
from rlhf.models.architecture import context_length_of
from rlhf.models.fast.verification import enable_fast_paths
from rlhf.models.loading import load_model
from rlhf.rollout.chat_format import ChatFormat, generation_stop_ids
from rlhf.rollout.sampling.base import NewTokens, RolloutEngine
from rlhf.rollout.sampling.continuous import ContinuousEngine
from rlhf.rollout.sampling.verification import check_sampler_or_disable_cache
from rlhf.rollout.text_decoder import IncrementalTextDecoder
from rlhf.serving.bodies import SamplingBody
from rlhf.serving.engine_thread import EngineThread
from rlhf.serving.errors import ApiError, overloaded_error, timeout_error, unknown_model_error
from rlhf.serving.generation import Choice, Generation
from rlhf.serving.prompt_logprobs import prompt_logprobs
from rlhf.serving.scheduler import PREFILL_TOKENS, Job, Overloaded, Scheduler
from rlhf.serving.text import TokenNames

SAMPLING_SEED_KEY = 23
"""First number of the sampling seeds, so that they differ from the seeds of training."""


class ServedModel:
    """A language model with its engine.

    Args:
        name: Name of the model in requests.
        model: Causal model.
        tokenizer: Its tokenizer.
        engine: Engine that samples from the model.
        parallel: Maximum number of completions that are sampled at once.
        limits: Limits of requests.
        thread: The thread in which the model was loaded; by default, a new thread.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        engine: RolloutEngine,
        *,
        parallel: int,
        limits: ServerLimits,
        thread: EngineThread | None = None,
    ) -> None:
        self.name, self.model, self.tokenizer, self.limits = name, model, tokenizer, limits
        self.chat_format = ChatFormat(tokenizer, stop_ids=generation_stop_ids(model))
        self.token_names = TokenNames(tokenizer)
        self.max_tokens = min(limits.max_tokens, context_length_of(model))
        thread = thread or EngineThread()
        thread.call(lambda: enable_fast_paths(model))
        self.scheduler = Scheduler(
            engine, max_running=parallel, max_waiting=limits.queue, thread=thread
        )
        self._vocab_size = model.get_input_embeddings().num_embeddings

    def check_name(self, name: str) -> None:
        """Raise ApiError if the name is not that of this model."""
        if name != self.name:
            raise unknown_model_error(name, [self.name], place="the routes for completions")

    def encode_prompt(self, prompt: str | Sequence[int], *, min_new_tokens: int = 1) -> list[int]:
        """Return the token ids of the prompt of a text completion.

        Args:
            prompt: Text or token ids.
            min_new_tokens: Number of tokens for which the prompt must leave room.

        Raises:
            ApiError: The prompt is empty or too long, or an id is not in the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        else:
            ids = list(prompt)
            if not all(0 <= token < self._vocab_size for token in ids):
                raise ApiError(
                    400, f"prompt: a token id is not in [0, {self._vocab_size})", param="prompt"
                )
        if not ids:
            raise ApiError(400, "prompt: the text has no tokens", param="prompt")
        self.check_length(ids, param="prompt", min_new_tokens=min_new_tokens)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS but without EOS if the tokenizer adds them."""
        ids = self.tokenizer(text)["input_ids"]
        end = [self.tokenizer.eos_token_id]
        if ids[-1:] == end and self.chat_format.encode(text)[-1:] != end:
            return ids[:-1]  # the tokenizer appended it
        return ids

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation, with the beginning of the assistant's turn.

        Raises:
            ApiError: The chat template cannot render the messages, or they are too long.
        """
        try:
            ids = self.chat_format.encode_prompt(messages)
        except UserError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        self.check_length(ids, param="messages")
        return ids

    def check_length(self, ids: Sequence[int], *, param: str, min_new_tokens: int = 1) -> None:
        """Raise ApiError if a prompt leaves no room for ``min_new_tokens`` tokens."""
        if len(ids) + min_new_tokens > self.max_tokens:
            raise ApiError(
                400,
                f"{param}: {len(ids)} tokens, but a prompt with its completion is limited to "
                f"{self.max_tokens} tokens",
                param=param,
                code="context_length_exceeded",
            )

    def checked_max_new_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        requested: int | None,
        *,
        option: str = "max_tokens",
    ) -> int:
        """Check and return the maximum number of tokens of the completions of prompts.

        Args:
            prompts: Token ids of the prompts.
            requested: The number in the request; None means as many as possible.
            option: Name of the number in the request.

        Raises:
            ApiError: The prompt with its completion would be too long.
        """
        room = self.max_tokens - max(map(len, prompts))
        if requested is not None and requested > room:
            raise ApiError(
                400,
                f"{option}: {requested} tokens after a prompt of {self.max_tokens - room} tokens "
                f"exceed the limit of {self.max_tokens} tokens",
                param=option,
                code="context_length_exceeded",
            )
        return room if requested is None else requested

    async def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], num_alternatives: int
    ) -> list[NewTokens]:
        """Return the log-probabilities of the tokens of prompts, from the second one on.

        Raises:
            ApiError: The queue is full, or the time limit is exceeded.
            EngineFailed: The engine cannot be used.
        """
        results: list[NewTokens] = []
        rows_per_pass = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        try:
            async with asyncio.timeout(self.limits.seconds):
                for start in range(0, len(prompts), rows_per_pass):
                    part = prompts[start : start + rows_per_pass]
                    results += await self.scheduler.call_in_engine_thread(
                        lambda part=part: prompt_logprobs(
                            self.model, part, num_alternatives=num_alternatives
                        )
                    )
        except Overloaded as error:
            raise overloaded_error(error.retry_seconds) from error
        except TimeoutError as error:
            raise timeout_error(self.limits.seconds) from error
        return results

    def start_generation(
        self,
        prompts: Sequence[Sequence[int]],
        body: SamplingBody,
        *,
        max_new_tokens: int,
        num_alternatives: int = 0,
        continues_prompt: bool = False,
        with_offsets: bool = False,
        text_offsets: Sequence[int] = (),
    ) -> Generation:
        """Start the completions of a request, n for each prompt.

        Args:
            prompts: Token ids of each prompt.
            body: The request.
            max_new_tokens: Maximum number of tokens of a completion; 0 samples nothing.
            num_alternatives: Number of most likely tokens at each position to return.
            continues_prompt: Whether the text of a completion continues that of its prompt.
            with_offsets: Whether the offsets of tokens in the text are needed.
            text_offsets: Number of characters of each prompt that precede the completion in the
                response; by default, there are none.

        Raises:
            ApiError: The queue is full.
            EngineFailed: The engine cannot be used.
        """
        generation = Generation(self.scheduler, time_limit=self.limits.seconds)
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        sampling = body.sampling_params(frozenset(self.chat_format.stop_ids))
        starts = [(number, sample) for number in range(len(prompts)) for sample in range(body.n)]
        choices = [
            Choice(
                index,
                prompts[number],
                IncrementalTextDecoder(self.tokenizer, prompts[number] if continues_prompt else ()),
                stop=body.stop,
                with_offsets=with_offsets,
                text_offset=text_offsets[number] if text_offsets else 0,
            )
            for index, (number, _) in enumerate(starts)
        ]
        jobs = [
            Job.with_new_episode(
                prompts[number],
                sampling,
                max_new_tokens=max_new_tokens,
                seed=(SAMPLING_SEED_KEY, seed, number, sample),
                num_alternatives=num_alternatives,
                incremental=body.stream or bool(body.stop),
                deliver=generation.receive_progress,
            )
            for number, sample in starts
        ]
        generation.start(choices, jobs if max_new_tokens else [])
        return generation

    def close(self) -> None:
        """Stop the scheduler, and close the engine."""
        self.scheduler.close()
        # `ContinuousEngine` has no method close.
        close = getattr(self.scheduler.engine, "close", None)
        if close is not None:
            close()


def load_served_model(config: ServeConfig) -> ServedModel:
    """Load the model of a configuration, and start its engine.

    Raises:
        UserError: The model or the engine cannot be used.
    """
    thread = EngineThread()
    try:
        model, tokenizer, engine = thread.call(lambda: _load_model_and_engine(config))
    except BaseException:
        thread.close()
        raise
    return ServedModel(
        config.model_name,
        model,
        tokenizer,
        engine,
        parallel=config.rollout.parallel,
        limits=config.limits,
        thread=thread,
    )


def _load_model_and_engine(config: ServeConfig) -> tuple[Any, Any, RolloutEngine]:
    """Return the model of a configuration, its tokenizer and its engine."""
    assert config.model is not None
    model, tokenizer = load_model(config.model, seed=0)
    model.requires_grad_(False)
    if config.rollout.engine.kind == "vllm":
        return model, tokenizer, _vllm_engine(config, model)
    check_sampler_or_disable_cache(model)
    engine = ContinuousEngine(model, max_rows=config.rollout.parallel, open_ended=True)
    return model, tokenizer, engine


def _vllm_engine(config: ServeConfig, model: Any) -> RolloutEngine:
    """Return an engine whose vLLM servers have the weights of the model."""
    from rlhf.rollout.vllm.engine import VLLMEngine

    spec = config.rollout.engine
    engine = VLLMEngine(
        model,
        spec,
        folder=Path(str(spec.folder)),
        context=context_length_of(model),
        temperature=1.0,
        max_requests=config.rollout.parallel,
    )
    engine.update_policy(1)
    return engine
