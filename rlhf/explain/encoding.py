"""Encode a conversation as a reward model does, with the text and the part of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf.common.conversation import Conversation
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import render_conversation
from rlhf.reward_models.core import Unscorable, content_text, last_reply
from rlhf.reward_models.learned import LearnedReward

Part = Literal["template", "prompt", "reply"]
"""Origin of a token: the chat template (which includes special tokens), the prompt or the reply."""

_MARKER = "\u2063part{}\u2063"
"""Placeholder for the content of a message, which shows where the template renders the content."""

_MORE_KEYS = ("reasoning_content", "tool_calls")
"""Keys of a message that a template renders beside the content."""

Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a reward model's input, with the text and the part of each token."""

    ids: list[int]
    """Token ids, [T]."""
    tokens: list[str]
    """Text of each token, [T]. The joined texts, without added special tokens, are the rendered
    conversation, or its end after truncation."""
    parts: list[Part]
    """Part of each token, [T]. A token that contains characters of a message and of the template
    belongs to the message."""
    ends: list[int | None]
    """Position after the last character of each token in the content of the last message, without
    the white space around the content, [T]; None for tokens that are not in this content."""

    def positions(self, part: Part) -> list[int]:
        """Return the positions of the tokens of a part."""
        return [i for i, name in enumerate(self.parts) if name == part]


def encode_with_parts(
    reward: LearnedReward, conversation: Conversation, *, num_prompt_messages: int
) -> EncodedConversation:
    """Return the input of a reward model for a conversation, as `LearnedReward.encode` returns it.

    Args:
        reward: The reward model.
        conversation: The conversation.
        num_prompt_messages: Number of messages before the reply.

    Raises:
        Unscorable: The conversation cannot be rendered, or has no tokens.
        UserError: The tokenizer does not return the characters of each token.
    """
    ids = reward.encode(conversation)
    if reward.sidecar.scope == "reply":
        conversation = [{"role": "assistant", "content": last_reply(conversation)}]
        num_prompt_messages = 0
    tokenizer = reward.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer of this reward model does not return the characters of its tokens; "
            "token attributions need a fast tokenizer (tokenizer.json)"
        )
    text = render_conversation(tokenizer, conversation)
    messages = _rendered_messages(tokenizer, conversation, text, num_prompt_messages)
    append_eos = reward.sidecar.append_eos
    all_ids, offsets, text = _ids_offsets_and_text(tokenizer, text, append_eos=append_eos)
    positions = _positions_after_left_truncation(tokenizer, all_ids, ids)
    pieces = _token_texts(text, offsets)
    names = tokenizer.convert_ids_to_tokens(all_ids)
    tokens, parts, ends = [], list[Part](), list[int | None]()
    for i in positions:
        span = offsets[i]
        tokens.append(str(names[i]) if span is None else pieces[i])
        index = None if span is None else _last_overlapping_message_index(span, messages)
        parts.append("template" if index is None else messages[index].part)
        end = None
        if span is not None and index is not None and messages[index].is_last:
            end = _end_in_content(span, messages[index].content)
        ends.append(end)
    return EncodedConversation(ids, tokens, parts, ends)


def _end_in_content(span: Span, content: Span | None) -> int | None:
    """Return the position after the last character of a token in a content; None if outside."""
    if content is None or span[1] <= content[0] or span[0] >= content[1]:
        return None
    return min(span[1], content[1]) - content[0]


def _ids_offsets_and_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, append_eos: bool
) -> tuple[list[int], list[Span | None], str]:
    """Encode a rendered text without truncation.

    Returns:
        - The token ids, [T].
        - The characters of each token; None for a special token that the tokenizer adds, [T].
        - The text without the EOS that is appended as a token.
    """
    if append_eos:
        text = text.rstrip().removesuffix(str(tokenizer.eos_token))
    encoding = tokenizer(
        text,
        add_special_tokens=tokenizer.chat_template is None,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, offsets = list(encoding["input_ids"]), list[Span | None]()
    special = encoding.encodings[0].special_tokens_mask  # type: ignore[index]
    for is_special, (start, end) in zip(special, encoding["offset_mapping"], strict=True):
        offsets.append(None if is_special and start == end else (start, end))
    if append_eos and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
        offsets.append(None)
    return ids, offsets, text


def _positions_after_left_truncation(
    tokenizer: PreTrainedTokenizerBase, all_ids: Sequence[int], ids: Sequence[int]
) -> list[int]:
    """Return the positions in `all_ids` of the ids that remain after truncation on the left."""
    removed = len(all_ids) - len(ids)
    positions = list(range(removed, len(all_ids)))
    if removed and all_ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        positions[0] = 0
    if [all_ids[i] for i in positions] != list(ids):
        raise AssertionError("the encoding of the conversation differs from that of the reward")
    return positions


def _token_texts(text: str, offsets: Sequence[Span | None]) -> list[str]:
    """Return the text of each token, so that the joined texts are the text.

    Characters between tokens, such as white space that a tokenizer removes, belong to the following
    token. A character that consists of several tokens belongs to the first of them. The text of
    an added special token is empty.
    """
    pieces, end = [], 0
    for span in offsets:
        stop = end if span is None else max(end, span[1])
        pieces.append(text[end:stop])
        end = stop
    return pieces


def _last_overlapping_message_index(
    offset: Span, messages: Sequence[_RenderedMessage]
) -> int | None:
    """Return the index of the last message that overlaps a token; None if no message does."""
    first, last = offset[0], max(offset[0], offset[1] - 1)
    overlapping = [i for i, m in enumerate(messages) if first < m.end and m.start <= last]
    return overlapping[-1] if overlapping else None


@dataclass(frozen=True)
class _RenderedMessage:
    """The characters of a message in the rendered conversation."""

    part: Part
    is_last: bool
    """Whether it is the last message of the conversation."""
    start: int
    """Position of the first character of the content, the reasoning or the tool calls."""
    end: int
    content: Span | None
    """Characters of the content; None if the template changes it."""


def _rendered_messages(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    text: str,
    num_prompt_messages: int,
) -> list[_RenderedMessage]:
    """Return the characters of each message in the rendered text.

    The conversation is also rendered with a marker in place of each message. The texts between the
    markers come from the template. A content is searched after the text that precedes its marker,
    because a content can itself contain text of the template. Characters between this text and the
    content are the reasoning of the message. If the template changes the content, for example a
    block of reasoning in it, all characters up to the next text of the template are the message.
    The white space around a message is ignored, because templates may remove it.
    """
    between, indices = _template_texts_and_message_indices(tokenizer, conversation)
    messages: list[_RenderedMessage] = []
    position = 0
    for number, index in enumerate(indices):
        message, before, after = conversation[index], between[number], between[number + 1]
        position = start = _end_of_template_text(text, position, before)
        is_last = number == len(indices) - 1
        content = content_text(message.get("content")).strip()
        if not (content or any(message.get(key) for key in _MORE_KEYS)):
            continue
        end = _end_of_message(text, start, after, is_last=is_last)
        content_start = text.find(content, start) if content else -1
        if content and message.get("reasoning_content"):  # which can contain the same text
            content_start = max(content_start, text.rfind(content, start, max(start, end)))
        span = None
        if content_start >= 0 and (
            content_start <= end or end < 0 or not text[start:content_start].strip()
        ):
            span = (content_start, content_start + len(content))
            end = span[1]
            if message.get("tool_calls"):
                end = _end_of_message(text, end, after, is_last=is_last)
        region = text[start : max(start, end)]
        if region.strip():
            start += len(region) - len(region.lstrip())
            position = start + len(region.strip())
            part: Part = "prompt" if index < num_prompt_messages else "reply"
            is_reply = index == len(conversation) - 1
            messages.append(_RenderedMessage(part, is_reply, start, position, span))
    return messages


def _end_of_message(text: str, start: int, after: str, *, is_last: bool) -> int:
    """Return the position of the text of the template that follows a message; -1 if not found."""
    end = text.rfind(after) if is_last and text.endswith(after) else text.find(after, start)
    return end if end >= start else -1


def _end_of_template_text(text: str, start: int, before: str) -> int:
    """Return the position after the text of the template before a message.

    If the template renders other text before this message than before its marker, such as a block
    for the reasoning, the result is the position after the equal characters.
    """
    at = text.find(before, start)
    if at >= 0:
        return at + len(before)
    start += len(text[start:]) - len(text[start:].lstrip())
    before = before.lstrip()
    pairs = zip(before, text[start:], strict=False)
    return start + next((i for i, (a, b) in enumerate(pairs) if a != b), len(before))


def _template_texts_and_message_indices(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> tuple[list[str], list[int]]:
    """Return the texts of the template before, between and after the messages.

    Returns:
        - The texts, one more than messages that the template renders.
        - The indices of the messages that the template renders.
    """
    marked, markers = "", [_MARKER.format(i) for i in range(len(conversation))]
    for removed in (_MORE_KEYS, ()):
        messages = [{k: v for k, v in m.items() if k not in removed} for m in conversation]
        try:
            marked = render_conversation(
                tokenizer, [{**m, "content": x} for m, x in zip(messages, markers, strict=True)]
            )
            break
        except Unscorable:  # such as a template that needs the call of each tool result
            if not removed:
                raise
    between, indices = [], []
    for index, marker in enumerate(markers):
        before, found_marker, rest = marked.partition(marker)
        if found_marker:
            between.append(before)
            indices.append(index)
            marked = rest
    return [*between, marked], indices
