"""Parse the bodies of requests, and check the types and ranges of their options.

An option that the server does not know or cannot honor is refused by name. Options of the OpenAI
API that the engines do not have are accepted with the value that has no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Interval
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError
from pydantic import Field as PydanticField

from rlhf.common.files import is_utf8_encodable
from rlhf.common.names import did_you_mean
from rlhf.common.ranges import MAX_INT32, shortened_repr
from rlhf.rollout.sampling.base import SamplingParams
from rlhf.serving.errors import ApiError

MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256
MAX_ALTERNATIVES = 20
"""Maximum number of most likely tokens at each position."""

MAX_DEPTH = 32
"""Maximum depth of lists and objects in conversations. Rewards copy the messages recursively."""

B = TypeVar("B", bound="Body")

_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
}
"""Option that is not supported -> values that have no effect."""
_LABEL_OPTIONS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Options that only label a request. They are accepted and have no effect."""


def _validate_text(value: str) -> str:
    if not is_utf8_encodable(value):
        raise ValueError("must not contain unpaired surrogates")
    return value


def _check_encoding_and_nesting(value: Any, depth: int = 0) -> None:
    """Raise ValueError if a text cannot be encoded as UTF-8, or the data are nested too deeply."""
    if isinstance(value, str):
        _validate_text(value)
    elif isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise ValueError(f"lists and objects must be nested at most {MAX_DEPTH} deep")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_encoding_and_nesting(item, depth + 1)


def _validate_stop_strings(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"must be a string or a list of at most {MAX_STOP_STRINGS} strings")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
            raise ValueError(f"each string must have 1 to {MAX_STOP_LENGTH} characters")
        _validate_text(string)
    return strings


def _validate_prompts(value: Any) -> Sequence[str | list[int]]:
    """Return the prompts in a text, a list of texts, a list of token ids, or a list of such lists.

    Raises:
        ValueError: The value has another form, or a prompt has no token id.
    """
    if isinstance(value, str):
        return [_validate_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a text, a list of texts, a list of token ids, or a list of such lists"
        )
    if all(isinstance(item, str) for item in value):
        return [_validate_text(item) for item in value]
    prompts = [value] if all(type(item) is int for item in value) else value
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt or any(type(i) is not int for i in prompt):
            raise ValueError("every prompt must be a text or a list of at least one token id")
    return prompts


def _validate_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one message")
    return [_validate_message(index, message) for index, message in enumerate(value)]


def _validate_message(index: int, message: Any) -> dict[str, str]:
    """Return the role and the text of a message; the role "developer" becomes "system".

    Raises:
        ValueError: The message has another role, an unknown key with a value, or parts that are not
            text.
    """
    if not isinstance(message, dict):
        raise ValueError(f"message {index} must be an object with role and content")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"message {index}: role must be system, user or assistant")
    empty = {"name", "tool_calls", "refusal", "audio", "function_call", "annotations"}
    for key, item in message.items():
        if key not in ("role", "content") and not (key in empty and item in (None, [], "")):
            raise ValueError(f"message {index}: {shortened_repr(key)} is not supported")
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"message {index}: only parts of type text are supported")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise ValueError(f"message {index}: content must be a text")
    return {"role": role, "content": _validate_text(content)}


def _validate_conversations(value: Any) -> list[list[dict[str, Any]]]:
    """Return conversations to score. A message can have additional keys, such as ``answer``.

    Raises:
        ValueError: The value is not a list of conversations, each with at least one message, or a
            text or the nesting is invalid.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one conversation")
    for number, conversation in enumerate(value):
        if not isinstance(conversation, list) or not conversation:
            raise ValueError(f"conversation {number} must be a list of at least one message")
        for message in conversation:
            if not (
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise ValueError(
                    f"conversation {number}: every message must have a role and a content as texts"
                )
    _check_encoding_and_nesting(value)
    return value


def _validate_temperature(value: float) -> float:
    if 0 < value < 1e-3:
        raise ValueError("must be 0 (greedy) or at least 0.001; logits may overflow below it")
    return value


Text = Annotated[str, Strict(), AfterValidator(_validate_text)]
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Interval(ge=0, le=MAX_INT32)]
PositiveCount = Annotated[int, Strict(), Interval(ge=1, le=MAX_INT32)]
Number = Annotated[float, Strict()]
Stop = Annotated[list[str], BeforeValidator(_validate_stop_strings)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: Flag = False
    """Whether the last chunk contains the numbers of tokens."""
    include_obfuscation: Literal[False] = False


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text
    """Name of the model or of the rewards."""


class SamplingBody(Body):
    """Options that text and chat completions share."""

    n: PositiveCount = 1
    temperature: Annotated[
        Number, Interval(ge=0, le=100), AfterValidator(_validate_temperature)
    ] = 1.0
    top_p: Annotated[Number, Interval(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Strict(), Interval(ge=-1, le=MAX_INT32)] = 0
    """Number of most likely tokens to keep; 0 and -1 keep all."""
    min_p: Annotated[Number, Interval(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Strict(), Interval(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = PydanticField(default_factory=list)
    stop_token_ids: list[Count] = PydanticField(default_factory=list, max_length=MAX_STOP_STRINGS)
    """Ids of additional tokens that end a completion."""
    ignore_eos: Flag = False
    """Whether only `stop`, `stop_token_ids` and the maximum length end a completion."""
    return_token_ids: Flag = False
    """Whether the response contains the token ids of the prompt and of the completions."""
    stream: Flag = False
    stream_options: StreamOptions | None = None

    def sampling_params(self, stop_ids: frozenset[int]) -> SamplingParams:
        """Return the parameters of the engine.

        Args:
            stop_ids: Tokens that end a completion of the model.
        """
        requested = frozenset(self.stop_token_ids)
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            stop_ids=requested if self.ignore_eos else requested | stop_ids,
        )

    def option_needing_local_engine(self) -> str | None:
        """Return an option of the request that only the engine in this process has, or None."""
        return "stream" if self.stream else None

    def check_option_conflicts(self) -> None:
        """Raise ApiError if options contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options has no effect without stream", param="stream_options"
            )


class CompletionBody(SamplingBody):
    """Body of ``/v1/completions``."""

    prompt: Annotated[list[Any], BeforeValidator(_validate_prompts)]
    """One or more prompts, as texts or as token ids."""
    max_tokens: Count = 16
    logprobs: Annotated[int, Strict(), Interval(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """Number of most likely tokens whose log-probabilities are returned at each position, in
    addition to those of the sampled tokens; None returns no log-probabilities."""
    echo: Flag = False
    """Whether the text and the log-probabilities of the prompt precede the completion."""
    best_of: PositiveCount | None = None

    def option_needing_local_engine(self) -> str | None:
        """Return an option of the request that only the engine in this process has, or None."""
        if self.logprobs is not None and (self.logprobs or self.echo):
            return "logprobs"
        return super().option_needing_local_engine()

    def check_option_conflicts(self) -> None:
        """Raise ApiError if options contradict each other."""
        super().check_option_conflicts()
        if self.best_of not in (None, self.n):
            raise ApiError(400, "best_of is not supported unless it equals n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1 without echo", param="max_tokens")


class ChatBody(SamplingBody):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(_validate_messages)]
    max_tokens: PositiveCount | None = None
    """Maximum number of tokens of a completion; by default, the limit of the server minus the
    number of tokens of the prompt."""
    max_completion_tokens: PositiveCount | None = None
    """New name of ``max_tokens`` in the OpenAI API."""
    logprobs: Flag = False
    top_logprobs: Annotated[int, Strict(), Interval(ge=0, le=MAX_ALTERNATIVES)] = 0
    """Number of most likely tokens whose log-probabilities are returned at each position."""

    def option_needing_local_engine(self) -> str | None:
        """Return an option of the request that only the engine in this process has, or None."""
        return "top_logprobs" if self.top_logprobs else super().option_needing_local_engine()

    def check_option_conflicts(self) -> None:
        """Raise ApiError if options contradict each other."""
        super().check_option_conflicts()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs has no effect without logprobs", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(
                400, "give max_tokens or max_completion_tokens, not both", param="max_tokens"
            )


class ScoreBody(Body):
    """Body of ``/v1/score``."""

    conversations: Annotated[list[Any], BeforeValidator(_validate_conversations)]


def read_body(kind: type[B], content: bytes) -> B:
    """Parse and check the body of a request.

    Raises:
        ApiError: The body is not JSON, or an option is unknown, not supported or invalid.
    """
    try:
        data = json.loads(content, parse_constant=_refuse_nan_and_infinity)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(_drop_or_refuse_unsupported_options(kind, data))
    except ValidationError as error:
        raise _api_error_of_validation_error(kind, error) from error


def _refuse_nan_and_infinity(name: str) -> None:
    """Raise ValueError for NaN and infinities, which Python's JSON parser would accept."""
    raise ValueError(f"{name} is not a number in JSON")


def _drop_or_refuse_unsupported_options(
    kind: type[Body], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options without labels, null values and unsupported options without effect.

    Raises:
        ApiError: An option that is not supported has a value with an effect.
    """
    neutral = _NEUTRAL_VALUES if issubclass(kind, SamplingBody) else {}
    labels = _LABEL_OPTIONS if issubclass(kind, SamplingBody) else ()
    options = {}
    for name, value in data.items():
        known = name in kind.model_fields or name in neutral
        if name in labels or (value is None and known):
            continue
        if name in neutral:
            if not any(type(value) is type(same) and value == same for same in neutral[name]):
                raise ApiError(
                    400, f"{name} is not supported: leave it out", param=name, code="unsupported"
                )
            continue
        options[name] = value
    return options


def _api_error_of_validation_error(kind: type[Body], error: ValidationError) -> ApiError:
    """Return the error for the first option that is invalid."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        hint = did_you_mean(name, kind.model_fields)
        return ApiError(400, f"unknown option {shortened_repr(name)}{hint}", param=name[:100])
    if first["type"] == "missing":
        return ApiError(400, f"{name} is required", param=name)
    reason = first.get("ctx", {}).get("error")
    rule = str(reason) if reason else first["msg"].replace("Input should be", "must be")
    path = ".".join(map(str, first["loc"]))
    return ApiError(400, f"{path[:100]}: {rule}", param=name)
