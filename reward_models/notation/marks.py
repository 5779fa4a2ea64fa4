"""Find an answer that a reply marks: by a tag, a box or the ``####`` of GSM8K."""

from __future__ import annotations

import re

from rlhf.reward_models.notation.lexer import NotUnderstood, closing_positions

_ANSWER_TAG = re.compile(r"<answer>", re.I)
_ANSWER_END = re.compile(r"</answer>", re.I)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(
    r"[\s$.,;:*\\()\[\]]*(?:(?:or|and|versus|vs)\b[\s$.,;*\\()\[\]]*)?", re.I
)
_HEADING = re.compile(r"[\s#*]*(?:the\s+)?(?:final\s+)?(?:answer|result)?[\s*:]*", re.I)
_STARTS_WITH_ANSWER = re.compile(
    r"\s*(?:(?:the\s+)?(?:final\s+)?answer\b|[-+−–(\[{\\$€£*.`]*\s*\\?[\d\\$({\[−–-]|\w\s*=)", re.I
)


def after_thinking(text: str) -> str:
    """Return ``text`` without its reasoning in ``<think>`` blocks."""
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


def last_box(text: str) -> tuple[int, int, str] | None:
    """Return start, end and content of the last ``\\boxed{...}`` with balanced braces, or None.

    Raises:
        NotUnderstood: The last box is not closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    end = closing_positions(text).get(boxes[-1].end() - 1)
    if end is None:
        raise NotUnderstood("a box that is not closed")
    return boxes[-1].start(), end + 1, text[boxes[-1].end() : end]


def answer_segment(reply: str) -> tuple[str, str, str]:
    """Return the part of a reply that contains the answer, and the texts before and after a box.

    The reply without its reasoning is searched, or only its last ``<answer>`` tag if it has one.
    The answer is the last box or the line after the last ``####``, whichever is later. Without
    either, it is the whole text. The last two results are empty unless the answer is a box.

    Raises:
        NotUnderstood: A tag or a box is not closed, or the last two boxes are alternatives.
    """
    text = after_thinking(reply)
    opened = list(_ANSWER_TAG.finditer(text))
    if opened:
        closing = _ANSWER_END.search(text, opened[-1].end())
        if closing is None:
            raise NotUnderstood("an answer tag that is not closed")
        text = text[opened[-1].end() : closing.start()]
    box, mark = last_box(text), text.rfind("####")
    if box is not None and box[0] > mark:
        start, end, content = box
        _refuse_alternative_box(text[:start], content)
        return content, text[:start], text[end:]
    if mark >= 0:
        return _after_mark(text[mark:].lstrip("#")), "", ""
    return text, "", ""


def is_box(reply: str) -> bool:
    """Return whether ``reply`` begins with a box."""
    return _BOX.match(reply.strip()) is not None


def _refuse_alternative_box(before: str, content: str) -> None:
    """Raise NotUnderstood if only a conjunction separates the last two boxes.

    ``before`` is the text before the last box, and ``content`` its content.
    """
    try:
        previous = last_box(before)
    except NotUnderstood:  # the other box is not closed
        return
    if previous is None or previous[2].strip() == content.strip():
        return
    if _BETWEEN_BOXES.fullmatch(before[previous[1] :]):
        raise NotUnderstood("several boxes")


def _after_mark(text: str) -> str:
    """Return the rest of the line after ``####``, or the following lines if it has no answer."""
    line, _, rest = text.partition("\n")
    is_heading = _HEADING.fullmatch(line[:200]) is not None
    if not rest.strip() or (_STARTS_WITH_ANSWER.match(line[:200]) and not is_heading):
        return line
    return rest
