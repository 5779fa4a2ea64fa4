"""Encode a conversation as a reward model does, with the text and the part of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf.common.conversation import Conversation
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import render_conversation
from rlhf.reward_models.core import content_text, last_reply
from rlhf.reward_models.learned import LearnedReward

Part = Literal["template", "prompt", "reply"]
"""Origin of a token: the chat template (which includes special tokens), the prompt or the reply."""

_MARKER = "\u2063part{}\u2063"
"""Placeholder for the content of a message, which shows where the template renders the content."""

Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a reward model's input, with the text and the part of each token."""

    ids: list[int]
    """Token ids, [T]."""
    tokens: list[str]
    """Text of each token, [T]. The joined texts, without added special tokens, are the rendered
    conversation."""
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
    spans_of_parts = _spans_of_parts(tokenizer, conversation, text, num_prompt_messages)
    append_eos = reward.sidecar.append_eos
    all_ids, offsets, text = _ids_and_offsets(tokenizer, text, append_eos=append_eos)
    kept = _positions_after_left_truncation(tokenizer, all_ids, ids)
    pieces = _token_texts(text, offsets)
    names = tokenizer.convert_ids_to_tokens(all_ids)
    tokens, parts, ends = [], list[Part](), list[int | None]()
    for i in kept:
        span = offsets[i]
        tokens.append(str(names[i]) if span is None else pieces[i])
        content = None if span is None else _last_overlapping(span, spans_of_parts)
        parts.append("template" if content is None else spans_of_parts[content][1])
        end = None
        if span is not None and content is not None and content == len(spans_of_parts) - 1:
            start, stop = spans_of_parts[content][0]
            end = min(span[1], stop) - start
        ends.append(end)
    return EncodedConversation(ids, tokens, parts, ends)


def _ids_and_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, *, append_eos: bool
) -> tuple[list[int], list[Span | None], str]:
    """Return the token ids of a rendered text, without truncation.

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
    kept = list(range(removed, len(all_ids)))
    if removed and all_ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        kept[0] = 0
    if [all_ids[i] for i in kept] != list(ids):
        raise AssertionError("the encoding of the conversation differs from that of the reward")
    return kept


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


def _last_overlapping(offset: Span, spans: Sequence[tuple[Span, Part]]) -> int | None:
    """Return the index of the last content that overlaps a token; None if no content does."""
    first, last = offset[0], max(offset[0], offset[1] - 1)
    overlapping = [i for i, ((start, end), _) in enumerate(spans) if first < end and start <= last]
    return overlapping[-1] if overlapping else None


def _spans_of_parts(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    text: str,
    num_prompt_messages: int,
) -> list[tuple[Span, Part]]:
    """Return the characters of each message's content in the rendered text.

    The conversation is also rendered with a marker instead of each content. The texts between the
    markers come from the template, and each content is searched after the text that precedes its
    marker. The white space around a content is ignored, because templates may remove it.
    """
    contents = [content_text(message.get("content")) for message in conversation]
    markers = [_MARKER.format(i) for i in range(len(conversation))]
    marked = render_conversation(
        tokenizer,
        [{**m, "content": x} for m, x in zip(conversation, markers, strict=True)],
    )
    spans: list[tuple[Span, Part]] = []
    position = 0
    for index, (marker, content) in enumerate(zip(markers, contents, strict=True)):
        before, found, rest = marked.partition(marker)
        if found:
            marked = rest
            at = text.find(before, position)
            position = position if at < 0 else at + len(before)
        stripped = content.strip()
        start = text.find(stripped, position) if stripped else -1
        if start < 0:
            continue
        position = start + len(stripped)
        spans.append(((start, position), "prompt" if index < num_prompt_messages else "reply"))
    return spans
