"""The routes for text and chat completions."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from rlhf.serving.bodies import ChatBody, CompletionBody, SamplingBody, read_body
from rlhf.serving.disconnect import result_while_connected
from rlhf.serving.errors import ApiError
from rlhf.serving.generation import Generation, Piece, echoed_prompt_piece
from rlhf.serving.metrics import ServerMetrics
from rlhf.serving.model import ServedModel
from rlhf.serving.responses import ChatCompletionJson, CompletionJson, TextCompletionJson
from rlhf.serving.scheduler import EngineFailed

T = TypeVar("T")


class CompletionRoutes:
    """Routes that sample from a model.

    Args:
        model: The model.
        metrics: Counters of the server.
    """

    def __init__(self, model: ServedModel, metrics: ServerMetrics) -> None:
        self.model, self.metrics = model, metrics
        # Tokenizers may not be thread-safe.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def close(self) -> None:
        """Stop the threads and the model."""
        self._encoding.shutdown()
        self.model.close()

    async def complete(self, request: Request) -> Response:
        """Complete the texts of a request to ``/v1/completions``."""
        body, model = read_body(CompletionBody, await request.body()), self.model
        self._check_server_limits_and_options(body, len(body.prompt))
        min_new_tokens = min(1, body.max_tokens)  # 0 with `echo`: only the prompt is returned
        prompts = await self._call_in_encoding_thread(
            lambda: [model.encode_prompt(p, min_new_tokens=min_new_tokens) for p in body.prompt]
        )
        max_new_tokens = model.checked_max_new_tokens(prompts, body.max_tokens)
        echoed_prompts: list[Piece] = []
        if body.echo:
            echoed_prompts = await result_while_connected(
                request, self._echoed_prompts(body, prompts)
            )
        generation = model.start_generation(
            prompts,
            body,
            max_new_tokens=max_new_tokens,
            num_alternatives=body.logprobs or 0,
            continues_prompt=True,
            with_offsets=body.logprobs is not None,
            text_offsets=[len(prompt.text) for prompt in echoed_prompts],
        )
        json_format = TextCompletionJson(
            model.name,
            model.token_names,
            body.n,
            with_logprobs=body.logprobs is not None,
            with_token_ids=body.return_token_ids,
        )
        return await self._respond(request, body, generation, echoed_prompts, json_format)

    async def chat(self, request: Request) -> Response:
        """Reply to the conversation of a request to ``/v1/chat/completions``."""
        body, model = read_body(ChatBody, await request.body()), self.model
        self._check_server_limits_and_options(body, 1)
        ids = await self._call_in_encoding_thread(lambda: model.encode_messages(body.messages))
        option = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_new_tokens = model.checked_max_new_tokens([ids], getattr(body, option), option=option)
        generation = model.start_generation(
            [ids],
            body,
            max_new_tokens=max_new_tokens,
            num_alternatives=body.top_logprobs,
        )
        json_format = ChatCompletionJson(
            model.name,
            model.token_names,
            body.n,
            with_logprobs=body.logprobs,
            with_token_ids=body.return_token_ids,
        )
        return await self._respond(request, body, generation, [], json_format)

    def _check_server_limits_and_options(self, body: SamplingBody, num_prompts: int) -> None:
        """Check the options that depend on the server or on each other.

        Raises:
            ApiError: The model is unknown, options contradict each other, there are too many
                completions, or the engine does not have an option.
        """
        model = self.model
        model.check_name(body.model)
        body.check_option_conflicts()
        limit = min(model.limits.completions, model.scheduler.capacity)
        if num_prompts * body.n > limit:
            raise ApiError(
                400,
                f"{num_prompts * body.n} completions, but a request is limited to {limit}",
                param="n",
            )
        if not model.scheduler.is_incremental and (name := body.option_needing_local_engine()):
            raise ApiError(
                400,
                f"{name} with this value needs rollout.engine.kind local, but this server samples "
                "on a vLLM server",
                param=name,
                code="unsupported",
            )

    async def _call_in_encoding_thread(self, function: Callable[[], T]) -> T:
        """Call a function of the tokenizer in a thread, so that other requests are not delayed."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function)

    async def _echoed_prompts(
        self, body: CompletionBody, prompts: Sequence[Sequence[int]]
    ) -> list[Piece]:
        """Return each prompt as the first piece of its choices.

        The pieces have log-probabilities if the request asks for them.
        """
        tokenizer = self.model.tokenizer
        scored: Sequence[Any] = [None] * len(prompts)
        if body.logprobs is not None:
            scored = await self.model.prompt_logprobs(prompts, body.logprobs)
        texts = [
            text if isinstance(text, str) else tokenizer.decode(text, skip_special_tokens=True)
            for text in body.prompt
        ]
        rows = zip(texts, prompts, scored, strict=True)
        return [
            echoed_prompt_piece(text, ids, score, tokenizer, with_alternatives=bool(body.logprobs))
            for text, ids, score in rows
        ]

    async def _respond(
        self,
        request: Request,
        body: SamplingBody,
        generation: Generation,
        echoed_prompts: Sequence[Piece],
        json_format: CompletionJson,
    ) -> Response:
        """Return the response with the choices, as a whole or as a stream.

        ``echoed_prompts`` has a piece for each prompt, or is empty.
        """
        choices = generation.choices
        self.metrics.prompt_tokens.inc(sum(len(c.prompt_ids) for c in choices[:: body.n]))
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            stream = self._stream_events(
                generation, echoed_prompts, json_format, include_usage=usage
            )
            return StreamingResponse(stream, media_type="text/event-stream")
        pieces = _first_pieces(generation, echoed_prompts, json_format.samples)

        async def collect() -> None:
            async with contextlib.aclosing(generation.pieces()) as new_pieces:
                async for choice, piece in new_pieces:
                    pieces[choice.index].extend(piece)
                    self.metrics.completion_tokens.inc(len(piece.tokens))

        await result_while_connected(request, collect())
        return JSONResponse(json_format.complete_response(list(zip(choices, pieces, strict=True))))

    async def _stream_events(
        self,
        generation: Generation,
        echoed_prompts: Sequence[Piece],
        json_format: CompletionJson,
        *,
        include_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Yield the events of a stream.

        An error is sent as the last event, because the status has been sent before.
        """
        keeps_empty = json_format.with_logprobs or json_format.with_token_ids
        started: set[int] = set()
        try:
            if echoed_prompts:
                firsts = _first_pieces(generation, echoed_prompts, json_format.samples)
                for choice, piece in zip(generation.choices, firsts, strict=True):
                    started.add(choice.index)
                    yield _server_sent_event(json_format.chunk(choice, piece, is_first=True))
            async with contextlib.aclosing(generation.pieces()) as new_pieces:
                async for choice, piece in new_pieces:
                    self.metrics.completion_tokens.inc(len(piece.tokens))
                    if piece.text or piece.finish_reason or (keeps_empty and piece.tokens):
                        is_first = choice.index not in started
                        started.add(choice.index)
                        yield _server_sent_event(
                            json_format.chunk(choice, piece, is_first=is_first)
                        )
            if include_usage:
                yield _server_sent_event(json_format.usage_chunk(generation.choices))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _server_sent_event(error.body())
        except EngineFailed as error:
            yield _server_sent_event(ApiError(500, str(error)).body())


def _first_pieces(
    generation: Generation, echoed_prompts: Sequence[Piece], samples: int
) -> list[Piece]:
    """Return the first piece of each choice: the echoed prompt, or an empty piece.

    Args:
        generation: The choices, ``samples`` for each prompt.
        echoed_prompts: A piece for each prompt, or an empty list.
        samples: Number of completions of each prompt.
    """
    pieces = [
        Piece(finish_reason=choice.finish_reason, is_prompt=True) for choice in generation.choices
    ]
    for index, piece in enumerate(pieces if echoed_prompts else []):
        piece.extend(echoed_prompts[index // samples])
    return pieces


def _server_sent_event(content: dict[str, Any]) -> bytes:
    """Return an event of a stream (server-sent events).

    Non-ASCII characters are escaped, because clients may split events at Unicode line separators.
    """
    return b"data: " + json.dumps(content).encode() + b"\n\n"
