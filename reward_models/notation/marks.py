"""Find an answer that a reply marks by an ``<answer>`` tag, a box or the ``####`` of GSM8K."""

from __future__ import annotations

import re
from typing import NamedTuple

from rlhf.common.text import after_thinking
from rlhf.reward_models.notation.lexer import NotUnderstood, closing_positions

_ANSWER_TAG_START = re.compile(r"<answer>", re.I)
_ANSWER_TAG_END = re.compile(r"</answer>", re.I)
_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(
    r"[\s$.,;:*\\()\[\]]*(?:(?:or|and|versus|vs)\b[\s$.,;*\\()\[\]]*)?", re.I
)
_ANSWER_HEADING = re.compile(r"[\s#*]*(?:the\s+)?(?:final\s+)?(?:answer|result)?[\s*:]*", re.I)
_STARTS_WITH_ANSWER = re.compile(
    r"\s*(?:(?:the\s+)?(?:final\s+)?answer\b|[-+−–(\[{\\$€£*.`]*\s*\\?[\d\\$({\[−–-]|\w\s*=)", re.I
)


def last_box(text: str) -> tuple[int, int, str] | None:
    """Return start, end and content of the last ``\\boxed{...}`` or ``\\fbox{...}``, or None.

    Raises:
        NotUnderstood: The last box is not closed.
    """
    boxes = list(_BOX_START.finditer(text))
    if not boxes:
        return None
    end = closing_positions(text).get(boxes[-1].end() - 1)
    if end is None:
        raise NotUnderstood("a box that is not closed")
    return boxes[-1].start(), end + 1, text[boxes[-1].end() : end]


class MarkedAnswer(NamedTuple):
    """The part of a reply that contains the answer."""

    text: str
    before: str = ""
    """Text before the box."""
    after: str = ""
    """Text after the box."""
    is_boxed: bool = False
    """Whether the part is the content of a box."""


def marked_answer(reply: str) -> MarkedAnswer:
    """Return the part of a reply that contains the answer.

    The reply is searched without its reasoning. If the reply has an ``<answer>`` tag, only the
    content of the last tag is searched. The answer is the last box or the text after the last
    ``####``, whichever is later. If there is neither, the answer is the whole searched text.

    Raises:
        NotUnderstood: A tag or a box is not closed, or the last two boxes have different contents
            and only punctuation or a conjunction between them.
    """
    text = after_thinking(reply)
    opened = list(_ANSWER_TAG_START.finditer(text))
    if opened:
        closing = _ANSWER_TAG_END.search(text, opened[-1].end())
        if closing is None:
            raise NotUnderstood("an answer tag that is not closed")
        text = text[opened[-1].end() : closing.start()]
    box, mark = last_box(text), text.rfind("####")
    if box is not None and box[0] > mark:
        start, end, content = box
        _reject_alternative_boxes(text[:start], content)
        return MarkedAnswer(content, text[:start], text[end:], is_boxed=True)
    if mark >= 0:
        return MarkedAnswer(_text_after_hashes(text[mark:].lstrip("#")))
    return MarkedAnswer(text)


def _reject_alternative_boxes(before: str, content: str) -> None:
    """Raise NotUnderstood if only punctuation or a conjunction separates two different boxes.

    They are the last two boxes of the text. ``before`` is the text before the last box, and
    ``content`` its content.
    """
    try:
        previous = last_box(before)
    except NotUnderstood:  # the other box is not closed
        return
    if previous is None or previous[2].strip() == content.strip():
        return
    if _BETWEEN_BOXES.fullmatch(before[previous[1] :]):
        raise NotUnderstood("several boxes")


def _text_after_hashes(text: str) -> str:
    """Return the rest of the line after ``####``; if it has no answer, the following lines."""
    line, _, rest = text.partition("\n")
    is_heading = _ANSWER_HEADING.fullmatch(line[:200]) is not None
    if not rest.strip() or (_STARTS_WITH_ANSWER.match(line[:200]) and not is_heading):
        return line
    return rest
