"""Cut a demonstration out of the chat template's rendering of the whole conversation.

The text of every reply is looked up between two renderings: the prompt that sampling would see
before it, and the conversation that ends with it. Only replies that the template writes in the
whole conversation as it writes them when they are the last turn are learned from; the others are
context, as in the whole. So no reply is learned in a form that it would not be sampled in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.data.conversation import RowDropped
from rlhf.reward_models.chat_template import TemplateRefused, split_reasoning, tools_of

if TYPE_CHECKING:
    from rlhf.rollout.chat_format import ChatFormat

Message = Mapping[str, Any]

# A reasoning block that a generation prompt opens, or opens and closes; whole blocks.
OPENED = re.compile(r"<think>\s*\Z")
PROMPTED = re.compile(r"<think>\s*(</think>\s*)?\Z")
BLOCK = re.compile(r"<think>.*?(</think>\s*|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A reply's place in the text of the whole conversation."""

    start: int
    end: int
    """Behind its closing token, where the template writes one."""
    prompt: str
    """What sampling would see before it."""
    unclosed: bool = False
    """The template writes no closing token at this place."""


def encode_demonstration(
    chat_format: ChatFormat, messages: Sequence[Message], first: int, notes: Counter[str]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the policy would have sampled.

    Args:
        chat_format: With a chat template.
        messages: The whole conversation; ``tools`` on the first message.
        first: Place of the first reply that may be learned from.
        notes: Counts replies that are not learned from, and what the template leaves out.

    Raises:
        RowDropped: says why the conversation cannot be encoded.
    """
    try:
        talk = _Talk(chat_format, messages)
        pieces = talk.pieces(first, notes)
    except TemplateRefused as refusal:
        raise RowDropped(str(refusal)) from refusal
    ids: list[int] = []
    is_action: list[bool] = []
    left = ""
    for text, learned, closing in pieces:
        new = chat_format.encode_after(left, text) if ids else chat_format.encode(text)
        new += [chat_format.closing.token] * closing
        ids += new
        is_action += [learned] * len(new)
        left = "" if closing else text
    return ids, is_action


# A text, whether it is learned from, and whether the closing token is put behind it.
Piece = tuple[str, bool, bool]


class _Talk:
    """One conversation, rendered as often as its replies need."""

    def __init__(self, chat_format: ChatFormat, messages: Sequence[Message]) -> None:
        self.format = chat_format
        self.messages = messages
        self.whole = chat_format.render(self.messages)

    def pieces(self, first: int, notes: Counter[str]) -> list[Piece]:
        """The text in pieces, up to the last reply that is learned from."""
        self._note_tools(notes)
        learned: list[Reply] = []
        last = len(self.messages) - 1
        asked = [
            index
            for index in range(first, last + 1)
            if self.messages[index]["role"] == "assistant"
            and self.messages[index].get("weight", 1) != 0
        ]
        if not asked:
            raise RowDropped("no reply to learn from: every weight is 0")
        for index in asked:
            reply = self._place(index)
            hidden = reply is not None and self._hides_reasoning(index, reply)
            if reply is not None and hidden and OPENED.search(reply.prompt):
                if index == last:
                    return self._spliced(learned, index, reply)
                reply = None
            if reply is None:
                notes["replies not learned: the template rewrites them when turns follow"] += 1
                continue
            if hidden:
                notes["replies without their reasoning: the template leaves it out"] += 1
            if not self.whole.startswith(reply.prompt):
                notes["replies without the reasoning block that sampling opens"] += 1
            learned.append(reply)
        if not learned:
            if self.messages[0]["role"] == "system":
                raise RowDropped(
                    "the chat template renders the prompt otherwise once it is answered (try "
                    "model.fold_system: true)"
                )
            raise RowDropped("the chat template renders the prompt otherwise once it is answered")
        return self._cut(learned, self.whole)

    def _place(self, index: int) -> Reply | None:
        """Where a reply is in the whole text; None where the whole has it in another form."""
        prompt = self.format.render(self.messages[:index], prompt=True)
        start = len(prompt)
        if not self.whole.startswith(prompt):
            start = len(PROMPTED.sub("", prompt))
            if not self.whole.startswith(prompt[:start]):
                return None
        final = index == len(self.messages) - 1
        text = self.whole if final else self.format.render(self.messages[: index + 1])
        closing = self.format.closing
        end = text.rfind(closing.text, start) if closing.written and not closing.opens_next else -1
        unclosed = end < 0
        if not unclosed:
            end += len(closing.text)
        elif special := self._last_special(text, start):
            end, unclosed = special, False
        elif closing.opens_next or not closing.written:
            end = len(text) if closing.opens_next else self._content_end(index, text, start)
        else:
            return None
        if not self.whole.startswith(text[:end]):
            return None
        if unclosed and closing.opens_next and not final:
            after = self._special_at(self.whole, end)
            end, unclosed = (end + after, False) if after else (end, True)
        return Reply(start, end, prompt, unclosed)

    def _content_end(self, index: int, text: str, start: int) -> int:
        """Where the content ends in a template that writes no closing token."""
        content = str(self.messages[index]["content"]).strip()
        found = text.rfind(content, start) if content else -1
        return max(start, found + len(content) if found >= 0 else len(text.rstrip()))

    def _last_special(self, text: str, start: int) -> int:
        """The end of a special token that ends ``text``, white space aside; 0: there is none."""
        bare = text.rstrip()
        for token in self.format.special_texts:
            if bare.endswith(token) and len(bare) - len(token) >= start:
                return len(bare)
        return 0

    def _special_at(self, text: str, place: int) -> int:
        """Length of the special token that begins at ``place``; 0: there is none."""
        found = [len(t) for t in self.format.special_texts if text.startswith(t, place)]
        return max(found, default=0)

    def _hides_reasoning(self, index: int, reply: Reply) -> bool:
        """Whether the message has reasoning that the whole text does not show."""
        reasoning, _ = split_reasoning(self.messages[index])
        shown = self.whole[reply.start : reply.end]
        return bool(reasoning.strip()) and reasoning.strip() not in shown

    def _spliced(self, learned: list[Reply], index: int, reply: Reply) -> list[Piece]:
        """A last reply whose reasoning the template drops, behind the block that sampling opens."""
        reasoning, _ = split_reasoning(self.messages[index])
        answer = self.whole[reply.start : reply.end].lstrip("\n")
        gap = "" if reply.prompt.endswith("\n") else "\n"
        text = f"{gap}{reasoning.strip()}\n</think>\n\n{answer}"
        shared = reply.prompt.startswith
        kept = [earlier for earlier in learned if shared(self.whole[: earlier.end])]
        pieces = self._cut(kept, self.whole) if kept else []
        done = sum(len(piece) for piece, _, _ in pieces)
        return [*pieces, (reply.prompt[done:], False, False), (text, True, reply.unclosed)]

    @staticmethod
    def _cut(learned: list[Reply], text: str) -> list[Piece]:
        pieces: list[Piece] = []
        cursor = 0
        for reply in learned:
            if reply.start > cursor:
                pieces.append((text[cursor : reply.start], False, False))
            pieces.append((text[reply.start : reply.end], True, reply.unclosed))
            cursor = reply.end
        return pieces

    def _note_tools(self, notes: Counter[str]) -> None:
        tools = tools_of(self.messages)
        if tools and not self.format.renders_tools:
            notes["conversations without their tools: the template leaves them out"] += 1
