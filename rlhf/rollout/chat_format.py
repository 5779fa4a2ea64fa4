"""Encode conversations as token ids with the model's chat template.

In rollouts, tokens are only appended. The prompt is encoded once, and sampled replies keep their
tokens. After a reply, the template's text between this reply and the next one is encoded and
appended. Replies are never encoded again, because the encoding of a reply's text may differ from
the sampled tokens.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError
from rlhf.reward_models.chat_template import (
    CALLS_WITHOUT_TEMPLATE,
    SENTINEL,
    TemplateRefused,
    folds_system,
    render_chat,
    system_message_refusal_reason,
    with_tools,
)
from rlhf.rollout.text_decoder import IncrementalReplyDecoder

Message = Mapping[str, Any]
Messages = Sequence[Message]

PROBE_USER: Message = {"role": "user", "content": "?"}
PROBE_REPLY: Message = {"role": "assistant", "content": SENTINEL}

# Reasoning blocks anywhere in a text.
THINK_BLOCK = re.compile(r"<think>.*?(</think>\s*|\Z)", re.DOTALL)

_MAX_SEPARATING_TOKENS = 100
"""With more added tokens, contexts are not shortened, because the search for the tokens is slow."""

# Number of characters before a text that are encoded together with it, see ``encode_after``.
LEFT_CONTEXT = 48


@dataclass(frozen=True)
class ClosingToken:
    """The token that ends the assistant's turn; see `ChatFormat._find_closing_token`."""

    token: int
    text: str
    """The token's text."""
    written: bool
    """Whether the template writes the token at the end of a reply."""
    opens_next: bool = False
    """Whether the token begins the header of the next turn, as in GLM. If so, the template does not
    write it after the last reply."""


class ChatFormat:
    """Chat format of a tokenizer.

    The format is the tokenizer's chat template. If the template is not used, as for base models,
    all texts are joined by ``separator``. In this case, a reply ends with EOS, with one of
    ``stop_ids`` or, if ``stop`` is set, with the first token that contains ``stop``.

    Args:
        tokenizer: Tokenizer of the policy, with the template's options (see
            ``rlhf.reward_models.chat_template``).
        chat: Whether to use the chat template. By default, it is used if there is one.
        separator: Text between the turns if the chat template is not used.
        stop: Text that ends a reply if the chat template is not used, for example a newline.
        stop_ids: Additional tokens that end a reply; see `generation_stop_ids`. Ids that are not
            added or special tokens of the tokenizer are ignored.

    Raises:
        UserError: No token can end a reply, no token contains ``stop``, the template cannot be
            used, or there is none and ``chat`` is True.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool | None = None,
        separator: str = "\n",
        stop: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        has_template = bool(tokenizer.chat_template)
        if chat and not has_template:
            raise UserError("rollout.chat is true, but the model's tokenizer has no chat template")
        self.tokenizer, self.separator, self.stop_text = tokenizer, separator, stop
        self.chat = has_template if chat is None else chat
        added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
        # A generation configuration can contain stop ids of a different vocabulary.
        known_stop_ids = set(stop_ids) & (added.keys() | special)
        self.stop_ids = {tokenizer.eos_token_id} - {None} | known_stop_ids
        self.special_ids = special | {i for i, t in added.items() if t.special} | self.stop_ids
        # Added tokens that consist of spaces only are excluded.
        self.added_ids = {i for i, token in added.items() if token.content.strip()}
        if stop is not None and not self.chat:
            self.stop_ids |= _tokens_containing(tokenizer, stop)
        self.text_after_reply = ""
        """Text that the template writes after the last reply of a conversation."""
        self._turn_problems = functools.cache(self._find_multi_turn_problem_and_note)
        self.closing = self._find_closing_token()
        self.stop_ids.add(self.closing.token)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Encode the messages before a reply, and the beginning of the assistant's turn.

        If no template is used and all texts are empty, the result is BOS, or the closing token if
        there is no BOS.

        Raises:
            UserError: The template cannot render the messages, or no template is used and a message
                has tool calls.
        """
        if not self.chat:
            if any(message.get("tool_calls") for message in messages):
                raise UserError(CALLS_WITHOUT_TEMPLATE)
            if text := self.join_contents(messages):
                # A base model was trained with its BOS. Some tokenizers also append EOS.
                ids = self.tokenizer(text)["input_ids"]
                return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
            begin = self.tokenizer.bos_token_id
            return [self.closing.token if begin is None else begin]
        return self.encode(self.render_prompt(messages))

    def render_prompt(self, messages: Messages) -> str:
        """Render the messages before a reply, and the beginning of the assistant's turn.

        Raises:
            UserError: The template cannot render the messages.
        """
        self.check_system_message_is_renderable(messages)
        try:
            return self.render(messages, prompt=True)
        except TemplateRefused as refusal:
            raise UserError(f"{refusal}; conversation: {_describe_messages(messages)}") from refusal

    def encode_text_between_replies(
        self, observation: str, *, reply: Sequence[int], has_system_message: bool = False
    ) -> list[int]:
        """Encode the text after a reply, which ends the reply's turn and adds the observation.

        Args:
            observation: Text of the environment.
            reply: Tokens of the reply. If the template writes a closing token and the reply does
                not end with it, the result includes this token.
            has_system_message: Whether the conversation has a system message.

        Raises:
            UserError: The template cannot render the observation, or rollouts of several turns are
                not possible with it.
        """
        if not self.chat:
            return self.encode_after("", self.separator + observation + self.separator)
        if problem := self._turn_problems(has_system_message)[0]:
            raise UserError(problem)
        try:
            ids = self.encode_after(SENTINEL, self._render_between_replies(observation))
        except TemplateRefused as refusal:
            raise UserError(f"{refusal}; observation: {observation[:40]!r}") from refusal
        closed = bool(reply) and reply[-1] == self.closing.token and self.closing.written
        return ids[ids.index(self.closing.token) + 1 :] if closed else ids

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Decode the tokens of a reply, without the stop token, but with its text before ``stop``.

        If the template writes a header of special tokens before a reply, such as the channel of
        gpt-oss, the result begins after the last header.
        """
        stopped = bool(ids) and ids[-1] in self.stop_ids
        content = ids[:-1] if stopped else ids
        if self.chat and self._reply_header:
            content = _ids_after_last_occurrence(list(content), self._reply_header)
        text = self.tokenizer.decode(content, skip_special_tokens=True)
        if stopped and self.stop_text is not None:  # the part of the token before the stop text
            text += self.tokenizer.decode([ids[-1]], skip_special_tokens=True).partition(
                self.stop_text
            )[0]
        return text

    def reply_decoder(self) -> IncrementalReplyDecoder:
        """Return a decoder for the tokens of one reply as they are sampled."""
        return IncrementalReplyDecoder(self.tokenizer, self._reply_header if self.chat else [])

    def check_system_message_is_renderable(self, messages: Messages) -> None:
        """Check that the template can render the system message, if there is one.

        Raises:
            UserError: The template cannot render the system message.
        """
        if (
            self.chat
            and messages
            and messages[0]["role"] == "system"
            and self.system_message_problem
        ):
            raise UserError(self.system_message_problem)

    @functools.cached_property
    def system_message_problem(self) -> str | None:
        """Why the template cannot render a system message; None if it can.

        The result is also None if system messages are added to the first user turn.
        """
        reason = (
            None if folds_system(self.tokenizer) else system_message_refusal_reason(self.tokenizer)
        )
        if reason is None:
            return None
        return (
            f"the model's chat template {reason}; remove the system message (data.system or "
            "rollout.system), or add it to the first user turn with model.fold_system: true"
        )

    def describe(self) -> str:
        """Return a one-line summary of the restrictions of the format and of how a reply ends."""
        if not self.chat:
            end = "EOS" if self.stop_text is None else f"EOS or {self.stop_text!r}"
            return f"no chat template: texts joined by {self.separator!r}, replies end with {end}"
        parts = [f"replies end with {self.closing.text}"]
        if folds_system(self.tokenizer):
            parts.append("system messages are added to the first user turn")
        elif self.system_message_problem:
            parts.append("no system role")
        problem, note = self._turn_problems(system=False)
        parts.append(f"single turn only ({problem})" if problem else note or "one or several turns")
        return "chat template: " + "; ".join(parts)

    # -- text ---------------------------------------------------------------------------------

    def join_contents(self, messages: Messages) -> str:
        """Join the contents of messages by the separator; it also ends a text that is not empty."""
        text = self.separator.join(message["content"] for message in messages)
        return text if not text or text.endswith(self.separator) else text + self.separator

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """Render messages with the template.

        If ``prompt`` is True, the start of the assistant's turn is added.

        Raises:
            TemplateRefused: The template cannot render the messages.
        """
        return render_chat(self.tokenizer, messages, add_generation_prompt=prompt)

    def encode(self, text: str) -> list[int]:
        """Encode a text without the special tokens that the tokenizer would add, such as BOS."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts like `encode`; a tokenizer in Rust encodes them in one call."""
        if not texts:
            return []
        if not self._is_standard_fast_tokenizer:
            return [self.encode(text) for text in texts]
        self.encode("")  # sets the options of the tokenizer in Rust
        backend = self.tokenizer.backend_tokenizer
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def shorten_left_context(self, left: str) -> str:
        """Return the end of a left context that has the same effect on the ids of the next text.

        A tokenizer in Rust first splits a text at its added tokens, and encodes each part on its
        own. The parts before the last added token of the context are therefore irrelevant, but the
        token itself is kept, so that the part after it is not the start of a text.
        """
        starts = [left.rfind(token) for token in self._always_splitting_token_texts]
        start = max(starts, default=-1)
        return left[start:] if start > 0 else left

    @functools.cached_property
    def _is_standard_fast_tokenizer(self) -> bool:
        """Whether `encode` only calls a tokenizer in Rust, without code of a subclass."""
        from transformers import PreTrainedTokenizerFast

        kind = type(self.tokenizer)
        return (
            issubclass(kind, PreTrainedTokenizerFast)
            and hasattr(self.tokenizer.backend_tokenizer, "encode_batch_fast")
            and all(
                getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None)
                for name in ("__call__", "_encode_plus", "_batch_encode_plus")
            )
        )

    @functools.cached_property
    def _always_splitting_token_texts(self) -> list[str]:
        """Texts of the special tokens at which a text is always split, see `shorten_left_context`.

        The list is empty if such splits are not certain, for example because an added token
        includes the space around it. A token is omitted if another added token can begin before it
        and overlap with it.
        """
        added = list(self.tokenizer.added_tokens_decoder.values())
        texts = [token.content for token in added]
        if (
            not self._is_standard_fast_tokenizer
            or self.tokenizer.split_special_tokens
            or len(added) > _MAX_SEPARATING_TOKENS
            or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added)
        ):
            return []
        return [
            token.content
            for token in added
            if token.special
            and not any(_can_begin_before_and_overlap(other, token.content) for other in texts)
        ]

    def encode_after(self, left: str, text: str) -> list[int]:
        """Return the token ids of ``text`` after ``left``, without the ids of ``left``.

        The left context is necessary because SentencePiece adds a space before the first word of a
        text. Its last `LEFT_CONTEXT` characters are used. If they are encoded differently before
        ``text``, the context is a newline, or else ``text`` is encoded alone.
        """
        if not text:
            return []
        for anchor in (left[-LEFT_CONTEXT:], "\n"):
            before = self.encode(anchor) if anchor else []
            both = self.encode(anchor + text) if before else []
            if before and both[: len(before)] == before:
                return both[len(before) :]
        return self.encode(text)

    @functools.cached_property
    def special_token_texts(self) -> list[str]:
        """Texts of the tokens in ``special_ids``."""
        return self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids))

    @functools.cached_property
    def renders_tools(self) -> bool:
        """Whether the template renders tools.

        The result is also True if the template cannot render the test message.
        """
        function = {"name": "probe", "description": "?", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        try:
            return self.render(with_tools([PROBE_USER], tools)) != self.render([PROBE_USER])
        except TemplateRefused:
            return True

    # -- properties of the template -----------------------------------------------------------

    def _find_closing_token(self) -> ClosingToken:
        """Find the token that ends a reply, and set ``text_after_reply``.

        Candidates are the special tokens that the template writes after a reply. If there are none,
        the added tokens after a reply are candidates. Tokens that the template writes both after
        the last reply and between turns are preferred, because some templates end the last reply
        differently (Phi-3, gpt-oss). Among the candidates, a stop token is preferred. If there are
        no candidates, the result is EOS. If the tokenizer has no EOS, the result is the stop token
        with the smallest id.

        Raises:
            UserError: No token can end a reply, or the template cannot render a reply.
        """
        if self.chat:
            probes = self._texts_after_and_between_replies()
            self.text_after_reply = probes[0]
            last, middle = map(self.encode, probes)
            pairs = zip(last, middle, strict=False)
            shared = [left for left, _ in itertools.takewhile(lambda p: p[0] == p[1], pairs)]
            for ids, pick, opens in ((shared, -1, False), (last, 0, False), (middle, 0, True)):
                special = [i for i in ids if i in self.special_ids]
                if ending := special or [i for i in ids if i in self.added_ids]:
                    # Cohere's template writes the next turn's header after the last reply too.
                    token = ([i for i in ending if i in self.stop_ids] or ending)[pick]
                    text = self.tokenizer.convert_ids_to_tokens(token)
                    return ClosingToken(token, text, written=True, opens_next=opens)
        eos = self.tokenizer.eos_token_id
        if eos is None and not self.stop_ids:
            raise UserError(
                "the tokenizer has no EOS token, so a reply would never end; set its EOS token"
            )
        token = min(self.stop_ids) if eos is None else eos
        return ClosingToken(token, self.tokenizer.convert_ids_to_tokens(token), written=False)

    def _texts_after_and_between_replies(self) -> tuple[str, str]:
        """Return the template's text after the last reply, and its text between two replies.

        If the template cannot render several turns, both are the text after the last reply.

        Raises:
            UserError: The template cannot render one turn, or omits the reply.
        """
        try:
            whole = self.render([PROBE_USER, PROBE_REPLY])
        except TemplateRefused as refusal:
            raise UserError(f"the model's chat template cannot be used: {refusal.reason}") from None
        _, separator, last = whole.partition(SENTINEL)
        if not separator:
            raise UserError("the model's chat template cannot be used: it leaves the reply out")
        try:
            return last, self._render_between_replies(PROBE_USER["content"])
        except (TemplateRefused, UserError):
            return last, last

    def _render_between_replies(self, observation: str) -> str:
        """Return the text between a reply and the next reply, which contains the observation.

        Raises:
            TemplateRefused: The template cannot render the messages.
            UserError: The template omits the first reply.
        """
        user_turn = {"role": "user", "content": observation}
        text = self.render([PROBE_USER, PROBE_REPLY, user_turn], prompt=True)
        _, separator, after = text.partition(SENTINEL)
        if not separator:
            raise UserError(_NO_MULTI_TURN_MESSAGE.format("leaves earlier replies out"))
        return after

    @functools.cached_property
    def _reply_header(self) -> list[int]:
        """Token ids of the header that the template writes between the prompt and the last reply.

        The result is [] if the header has no special tokens.
        """
        start = len(self.render([PROBE_USER], prompt=True))
        head = self.encode(self.render([PROBE_USER, PROBE_REPLY])[start:].partition(SENTINEL)[0])
        return head if any(i in self.special_ids for i in head) else []

    @functools.cached_property
    def generation_prompt(self) -> str:
        """Text with which the template opens the assistant's turn after a user turn, or ""."""
        try:
            before, opened = self.render([PROBE_USER]), self.render([PROBE_USER], prompt=True)
        except TemplateRefused:
            return ""
        return opened[len(before) :] if opened.startswith(before) else ""

    def _find_multi_turn_problem_and_note(self, system: bool) -> tuple[str | None, str | None]:
        """Check whether rollouts can have several turns with this template.

        Args:
            system: Whether the conversation has a system message.

        Returns:
            The reason why rollouts cannot have several turns, or None. Then a note about a
            restriction of rollouts with several turns, or None.
        """
        first: list[Message] = [{"role": "system", "content": "?"}] if system else []
        first.append(PROBE_USER)
        try:
            prompt, reply = self.render(first, prompt=True), self.render([*first, PROBE_REPLY])
            turns = self.render([*first, PROBE_REPLY, PROBE_USER], prompt=True)
            thought = {**PROBE_REPLY, "content": f"<think>\n{SENTINEL}\n</think>\n\n?"}
            keeps = SENTINEL in self.render([*first, thought, PROBE_USER], prompt=True)
            longer = self.render(
                [*first, PROBE_REPLY, PROBE_USER, PROBE_REPLY, PROBE_USER], prompt=True
            )
        except TemplateRefused as refusal:
            return _NO_MULTI_TURN_MESSAGE.format(
                f"cannot render several turns ({refusal.reason})"
            ), None
        if SENTINEL not in turns or longer.count(SENTINEL) < 2:
            return _NO_MULTI_TURN_MESSAGE.format("leaves earlier replies out"), None
        if not _have_same_text_after_last_reply(turns, longer):
            return _NO_MULTI_TURN_MESSAGE.format(
                "renders a turn differently at another position"
            ), None
        if self.closing.written and not self.closing.opens_next:
            reply = reply[: reply.rindex(self.closing.text) + len(self.closing.text)]
        else:
            reply = reply[: reply.index(SENTINEL) + len(SENTINEL)]
        if all(map(turns.startswith, (prompt, reply))) and keeps:
            return None, None
        without_reasoning = THINK_BLOCK.sub("", turns)
        if not all(
            without_reasoning.startswith(THINK_BLOCK.sub("", text)) for text in (prompt, reply)
        ):
            return _NO_MULTI_TURN_MESSAGE.format(
                "rewrites earlier turns when another turn follows"
            ), None
        return None, (
            "in rollouts of several turns, earlier replies keep their reasoning, although the "
            "template would omit it"
        )


_NO_MULTI_TURN_MESSAGE = (
    "the model's chat template {}, so rollouts of several turns are not possible; rollouts of one "
    "turn are possible"
)


def generation_stop_ids(model: Any) -> list[int]:
    """Return the ids of the stop tokens in the generation configuration saved with a model.

    Without a saved configuration, transformers copies the stop tokens of the model's configuration.
    Then only a list is used, because a single id can be the default of the model's class.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return []
    eos = config.eos_token_id
    if isinstance(eos, int):
        return [] if getattr(config, "_from_model_config", False) else [eos]
    return list(eos or ())


def _have_same_text_after_last_reply(first: str, second: str) -> bool:
    """Return whether two renderings have the same text after the last reply (`SENTINEL`).

    Reasoning blocks are ignored.
    """
    first, second = (THINK_BLOCK.sub("", text).rpartition(SENTINEL)[2] for text in (first, second))
    return first == second


def _can_begin_before_and_overlap(first: str, second: str) -> bool:
    """Return whether an occurrence of ``first`` can begin before one of ``second`` and overlap."""
    contains = second in first[1:]
    sizes = range(1, min(len(first), len(second)))
    return contains or any(first.endswith(second[:size]) for size in sizes)


def _tokens_containing(tokenizer: Any, text: str) -> set[int]:
    """Return the ids of all tokens whose text contains ``text``.

    Raises:
        UserError: No token contains ``text``.
    """
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    token_ids = {i for i, piece in enumerate(pieces) if text in piece}
    if not token_ids:
        raise UserError(f"rollout.stop: no single token of this model contains {text!r}")
    return token_ids


def _ids_after_last_occurrence(ids: list[int], sequence: list[int]) -> list[int]:
    """Return the ids after the last occurrence of ``sequence`` in ``ids``.

    If it does not occur, return all ids.
    """
    for start in range(len(ids) - len(sequence), -1, -1):
        if ids[start : start + len(sequence)] == sequence:
            return ids[start + len(sequence) :]
    return ids


def _describe_messages(messages: Messages) -> str:
    """Return all roles and the start of the last message's content, for error messages."""
    roles = ", ".join(message["role"] for message in messages)
    return f"{roles}: {str(messages[-1]['content'])[:40]!r}"
