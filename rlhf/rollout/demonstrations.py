"""Encode demonstrations with the chat template's rendering of the whole conversation.

The token ids of a demonstration decode to the rendered text up to the last reply that is trained
on. If the template omits the closing token of a reply, the token is inserted. If it omits the
reasoning of the last reply, and the prompt ends with an open <think> tag, the reasoning is
inserted. A conversation in which no reply can be trained on is dropped with a reason.

A reply is located with two renderings. One is the prompt before the reply, as in sampling. The
other is the conversation that ends with the reply. A reply is trained on only if the template
renders it equally as the last turn and within the whole conversation. Apart from reasoning that
the template omits, a reply that is trained on therefore has the form in which it would be sampled.
Other replies are in the context, but are not trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import (
    CALLS_WITHOUT_TEMPLATE,
    SENTINEL,
    TemplateRefused,
    fold_system,
    folds_system,
    split_reasoning,
    tools_of,
    with_tools,
)
from rlhf.rollout.chat_format import LEFT_CONTEXT, ChatFormat, Message, Messages

# Reasoning tags at the end of a prompt. The first pattern matches an open block, the second an open
# or an empty block.
OPEN_THINK_TAG = re.compile(r"<think>\s*\Z")
THINK_TAGS_AT_END = re.compile(r"<think>\s*(</think>\s*)?\Z")

_WITHOUT_TEMPLATE = "(there is no chat template)"
NOT_AS_SAMPLED = "replies not trained on: the template does not render them as they are sampled"


@dataclass(frozen=True)
class ReplyPosition:
    """Position of a reply in the text of the whole conversation, in characters."""

    start: int
    end: int
    """End of the reply, including the closing token if the template writes one."""
    prompt: str
    """The prompt from which the reply would be sampled."""
    unclosed: bool = False
    """Whether the closing token is appended, because the template writes none after this reply."""
    substitute_closing: str = ""
    """Token that replaces the closing token after a last reply that calls tools, or an empty text.
    The template writes it before a tool result."""


TokensAndLossMask = tuple[list[int], list[bool]]
"""Token ids [T] of a text and its loss mask [T]."""
Piece = tuple[str, bool, bool]
"""(text, whether it is trained on, whether the closing token is appended to it)."""


def encode_example(
    chat_format: ChatFormat,
    prompt: Messages,
    completion: Messages,
    *,
    notes: Counter[str] | None = None,
) -> TokensAndLossMask:
    """Encode a demonstration, and mark the tokens to train on.

    Args:
        chat_format: Chat format of the model.
        prompt: Messages before the completion, which are not trained on. If there are tools, one of
            these messages contains them.
        completion: The other messages, of which the first is a reply. Replies with ``weight: 0``
            are not trained on.
        notes: Reason -> number of omissions and changes; updated in place.

    Returns:
        Token ids [T], up to the last reply to train on, and the loss mask [T].

    Raises:
        RowDropped: The template cannot render the conversation, a message has tool calls and there
            is no template, or no reply can be trained on.
        UserError: ``completion`` does not start with a reply, or the template cannot render system
            messages.
    """
    rendered = render_or_encode_example(chat_format, prompt, completion, notes=notes)
    return rendered if isinstance(rendered, tuple) else encode_pieces(chat_format, [rendered])[0]


def render_or_encode_example(
    chat_format: ChatFormat,
    prompt: Messages,
    completion: Messages,
    *,
    notes: Counter[str] | None = None,
) -> list[Piece] | TokensAndLossMask:
    """Return the pieces of a demonstration, which `encode_pieces` encodes.

    Without a chat template, the result is the encoded demonstration, as from `encode_example`. The
    arguments and the errors are those of `encode_example`.
    """
    if not completion or completion[0]["role"] != "assistant":
        raise UserError("a completion must start with the assistant's turn")
    notes = Counter() if notes is None else notes
    messages = [*prompt, *completion]
    if not chat_format.chat:
        return _encode_without_template(chat_format, messages, len(prompt), notes)
    chat_format.check_system_message_is_renderable(messages)
    first_trained_index = len(prompt)
    if folds_system(chat_format.tokenizer) and messages[0]["role"] == "system":
        notes["system messages added to the first user turn"] += 1
        messages = with_tools(fold_system(messages), tools_of(messages))
        first_trained_index -= 1
    try:
        rendered = _RenderedConversation(chat_format, messages)
        return rendered.split_into_pieces(first_trained_index, notes)
    except TemplateRefused as refusal:
        raise RowDropped(str(refusal)) from refusal


def encode_pieces(
    chat_format: ChatFormat, conversations: Sequence[Sequence[Piece]]
) -> list[TokensAndLossMask]:
    """Encode the pieces of conversations with one call of `ChatFormat.encode_many`.

    The end of the previous piece is the left context of a piece, see `ChatFormat.encode_after`.
    """
    numbers: dict[str, int] = {}  # text -> index in the list of texts

    def number_of(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    plans = []
    for pieces in conversations:
        plan: list[tuple[int, int]] = []  # indices of the left context, and of both texts
        left = ""
        for text, _, closing in pieces:
            if not plan:
                plan.append((-1, number_of(text)))
            else:
                anchor = chat_format.shorten_left_context(left[-LEFT_CONTEXT:]) or "\n"
                plan.append((number_of(anchor), number_of(anchor + text)))
            left = "" if closing else text
        plans.append(plan)
    encoded = chat_format.encode_many(list(numbers))
    return [
        _join_encoded_pieces(chat_format, pieces, plan, encoded)
        for pieces, plan in zip(conversations, plans, strict=True)
    ]


def _join_encoded_pieces(
    chat_format: ChatFormat,
    pieces: Sequence[Piece],
    text_indices: Sequence[tuple[int, int]],
    encoded: Sequence[list[int]],
) -> TokensAndLossMask:
    """Join the token ids of the pieces of one conversation, and mark those to train on.

    Args:
        chat_format: Chat format of the model.
        pieces: The pieces.
        text_indices: For each piece, the indices in ``encoded`` of its left context, and of the
            left context with its text. The first piece has no left context, and the index -1.
        encoded: Token ids of the texts of all conversations.
    """
    ids: list[int] = []
    is_action: list[bool] = []
    left = ""
    for (text, learned, closing), (before, whole) in zip(pieces, text_indices, strict=True):
        if before < 0:
            new = encoded[whole]
        elif not ids:
            new = chat_format.encode(text)
        else:
            start, both = encoded[before], encoded[whole]
            if text and start and both[: len(start)] == start:
                new = both[len(start) :]
            else:
                new = chat_format.encode_after(left, text)
        ids += new
        if closing:
            ids.append(chat_format.closing.token)
        is_action += [learned] * (len(ids) - len(is_action))
        left = "" if closing else text
    return ids, is_action


def _encode_without_template(
    chat_format: ChatFormat, messages: Messages, first_trained_index: int, notes: Counter[str]
) -> TokensAndLossMask:
    """Encode a demonstration without a chat template, up to the last reply to train on.

    ``first_trained_index`` is the index of the first message that may be trained on. Replies from
    it on end with the closing token. The earlier messages are joined as in a prompt. Tools and
    reasoning are omitted and counted in ``notes``.

    Raises:
        RowDropped: A message has tool calls, or no reply can be trained on.
    """
    if any(message.get("tool_calls") for message in messages):
        raise RowDropped(CALLS_WITHOUT_TEMPLATE)
    if tools_of(messages):
        notes[f"conversations without their tools {_WITHOUT_TEMPLATE}"] += 1
    if any(message.get("reasoning_content") for message in messages):
        notes[f"conversations without their reasoning {_WITHOUT_TEMPLATE}"] += 1
    ids = chat_format.encode_prompt(messages[:first_trained_index])
    is_action = [False] * len(ids)
    left = chat_format.join_contents(messages[:first_trained_index])
    separator = chat_format.separator
    for index, message in enumerate(messages[first_trained_index:]):
        learned = message["role"] == "assistant" and message.get("weight", 1) != 0
        text = message["content"]
        if message["role"] == "assistant":
            new = [*chat_format.encode_after(left, text), chat_format.closing.token]
            left = ""
        else:
            follows = messages[first_trained_index + index - 1]["role"] == "assistant"
            text = f"{separator if follows else ''}{text}{separator}"
            new = chat_format.encode_after(left, text)
            left = text
        ids += new
        is_action += [learned] * len(new)
    if not any(is_action):
        raise RowDropped("no reply to learn from")
    length = len(ids) - is_action[::-1].index(True)
    return ids[:length], is_action[:length]


class _RenderedConversation:
    """The template's rendering of one conversation, and the positions of its replies."""

    def __init__(self, chat_format: ChatFormat, messages: Sequence[Message]) -> None:
        self.format = chat_format
        self.messages = messages
        self.whole = chat_format.render(self.messages)

    def split_into_pieces(self, first_trained_index: int, notes: Counter[str]) -> list[Piece]:
        """Split the text at the replies to train on. The text after the last of them is omitted.

        Reasoning that the template omits from the last reply is inserted into its piece if the
        prompt of the reply ends with an open <think> tag.

        Args:
            first_trained_index: Index of the first message that may be trained on.
            notes: Reason -> number of replies that are not trained on and of texts that the
                template omits; updated in place.

        Raises:
            RowDropped: No reply can be trained on.
        """
        if tools_of(self.messages) and not self.format.renders_tools:
            notes["conversations without their tools: the template leaves them out"] += 1
        if self._omits_content_beside_tool_calls():
            notes["tool calls without the text before them: the template leaves it out"] += 1
        trained_replies: list[ReplyPosition] = []
        last = len(self.messages) - 1
        candidates = [
            index
            for index in range(first_trained_index, last + 1)
            if self.messages[index]["role"] == "assistant"
            and self.messages[index].get("weight", 1) != 0
        ]
        if not candidates:
            raise RowDropped("no reply to learn from: every weight is 0")
        for index in candidates:
            reply = self._locate_reply(index)
            hidden = reply is not None and self._omits_reasoning(index, reply)
            if reply is not None and hidden and OPEN_THINK_TAG.search(reply.prompt):
                if index == last:
                    return self._pieces_with_inserted_reasoning(trained_replies, reply)
                reply = None
            if reply is None:
                notes[NOT_AS_SAMPLED] += 1
                continue
            if hidden:
                notes["replies without their reasoning: the template leaves it out"] += 1
            if not self.whole.startswith(reply.prompt):
                notes["replies without the reasoning block of the generation prompt"] += 1
            trained_replies.append(reply)
        if not trained_replies:
            system = self.messages[0]["role"] == "system"
            hint = " (try model.fold_system: true)" if system else ""
            raise RowDropped(f"the chat template renders no reply as it is sampled{hint}")
        return self._split_at_replies(trained_replies, self.whole)

    def _omits_content_beside_tool_calls(self) -> bool:
        """Return whether the template omits the content of a message with tool calls."""
        with_text = [bool(m.get("tool_calls") and m["content"].strip()) for m in self.messages]
        if not any(with_text):
            return False
        marked = [
            {**message, "content": SENTINEL} if has_text else message
            for message, has_text in zip(self.messages, with_text, strict=True)
        ]
        return self.format.render(marked).count(SENTINEL) < sum(with_text)

    def _locate_reply(self, index: int) -> ReplyPosition | None:
        """Return the position of message ``index`` in the whole text.

        The result is None if the template renders the prompt or the reply differently in the whole
        text, or if the end of the reply is not found.
        """
        prompt = self.format.render(self.messages[:index], prompt=True)
        start = len(prompt)
        if not self.whole.startswith(prompt):
            start = len(THINK_TAGS_AT_END.sub("", prompt))
            if not self.whole.startswith(prompt[:start]):
                return None
        start += self._assistant_header_length_at(start)
        final = index == len(self.messages) - 1
        text = self.whole if final else self.format.render(self.messages[: index + 1])
        closing = self.format.closing
        end = text.rfind(closing.text, start) if closing.written and not closing.opens_next else -1
        unclosed = end < 0
        if not unclosed:
            end += len(closing.text)
        elif special := self._trailing_special_token_end_or_zero(text, start):
            end, unclosed = special, False
        elif closing.opens_next or not closing.written:
            end = len(text) if closing.opens_next else self._end_of_unclosed_last_reply(text, start)
        else:
            return None
        if not self.whole.startswith(text[:end]):
            return None
        if unclosed and closing.opens_next and not final:
            after = self._special_token_length_at(self.whole, end)
            end, unclosed = (end + after, False) if after else (end, True)
        substitute = self._token_before_tool_result(end) if unclosed and final else ""
        return ReplyPosition(start, end, prompt, unclosed and not substitute, substitute)

    def _assistant_header_length_at(self, start: int) -> int:
        """Return the length of the assistant's header after the prompt of a reply, or 0.

        Some templates omit the header from a prompt that ends with a tool result, but write it if a
        reply follows. The model does not sample the header, so it is not trained on.
        """
        opening = THINK_TAGS_AT_END.sub("", self.format.generation_prompt)
        is_in_prompt = self.whole.endswith(opening, 0, start)
        return len(opening) if self.whole.startswith(opening, start) and not is_in_prompt else 0

    def _token_before_tool_result(self, end: int) -> str:
        """Return the special token between the last reply, which calls tools, and a tool result.

        The result is "" if there is none, or if the last reply calls no tool.
        """
        if not self.format.closing.opens_next or not self.messages[-1].get("tool_calls"):
            return ""
        try:
            text = self.format.render([*self.messages, {"role": "tool", "content": SENTINEL}])
        except TemplateRefused:
            return ""
        follows = text.startswith(self.whole[:end])
        return text[end : end + self._special_token_length_at(text, end)] if follows else ""

    def _end_of_unclosed_last_reply(self, text: str, start: int) -> int:
        """Return the end of the reply that begins at ``start``, the last one in ``text``.

        The template writes no closing token after the reply. Other text that it writes after
        replies does not belong to the reply.
        """
        after = self.format.text_after_reply
        end = len(text) - len(after) if text.endswith(after) else len(text.rstrip())
        return max(start, end)

    def _trailing_special_token_end_or_zero(self, text: str, start: int) -> int:
        """Return the end of the special token that ends ``text``, before trailing white space.

        The result is 0 if there is no special token at the end, or if this token begins before
        ``start``.
        """
        stripped = text.rstrip()
        for token in self.format.special_token_texts:
            if stripped.endswith(token) and len(stripped) - len(token) >= start:
                return len(stripped)
        return 0

    def _special_token_length_at(self, text: str, position: int) -> int:
        """Return the length of the special token at ``position``, or 0 if there is none."""
        lengths = [len(t) for t in self.format.special_token_texts if text.startswith(t, position)]
        return max(lengths, default=0)

    def _omits_reasoning(self, index: int, reply: ReplyPosition) -> bool:
        """Return whether a message has reasoning that the template omits in the whole text."""
        reasoning, _ = split_reasoning(self.messages[index])
        shown = self.whole[reply.start : reply.end]
        return bool(reasoning.strip()) and reasoning.strip() not in shown

    def _pieces_with_inserted_reasoning(
        self, trained_replies: list[ReplyPosition], last_reply: ReplyPosition
    ) -> list[Piece]:
        """Return the pieces, and insert the omitted reasoning of the last message into its piece.

        Args:
            trained_replies: Positions of the earlier replies to train on. Those that the prompt of
                the last reply does not contain equally are not trained on.
            last_reply: Position of the last message, whose prompt ends with an open <think> tag.
        """
        reasoning, _ = split_reasoning(self.messages[-1])
        answer = self.whole[last_reply.start : last_reply.end].lstrip("\n")
        gap = "" if last_reply.prompt.endswith("\n") else "\n"
        text = f"{gap}{reasoning.strip()}\n</think>\n\n{answer}"
        shared = last_reply.prompt.startswith
        earlier_replies = [reply for reply in trained_replies if shared(self.whole[: reply.end])]
        pieces = self._split_at_replies(earlier_replies, self.whole) if earlier_replies else []
        length = sum(len(piece) for piece, _, _ in pieces)
        prompt_rest = last_reply.prompt[length:]
        return [*pieces, (prompt_rest, False, False), (text, True, last_reply.unclosed)]

    @staticmethod
    def _split_at_replies(trained_replies: list[ReplyPosition], text: str) -> list[Piece]:
        """Split a text into the replies to train on and the texts before each of them.

        The text after the last of these replies is omitted.
        """
        pieces: list[Piece] = []
        cursor = 0
        for reply in trained_replies:
            if reply.start > cursor:
                pieces.append((text[cursor : reply.start], False, False))
            reply_text = text[reply.start : reply.end] + reply.substitute_closing
            pieces.append((reply_text, True, reply.unclosed))
            cursor = reply.end
        return pieces
