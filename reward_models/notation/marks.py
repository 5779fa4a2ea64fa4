"""Where a reply says that its answer is: tags, boxes and the ``####`` of GSM8K."""

from __future__ import annotations

import re

from rlhf.reward_models.notation.lexer import NotUnderstood

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
    """``text`` without its reasoning: what is in ``<think>`` blocks is no answer."""
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


def last_box(text: str) -> tuple[int, int, str] | None:
    """Start, end and content of the last ``\\boxed{...}``, its braces paired, or None.

    Raises:
        NotUnderstood: the last box is not closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    found = boxes[-1]
    end = closing_brace(text, found.end() - 1)
    if end is None:
        raise NotUnderstood("a box that is not closed")
    return found.start(), end + 1, text[found.end() : end]


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace at ``start`` is closed; an escaped brace does not count."""
    depth, place = 0, start
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 1
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return None


def answer_segment(reply: str) -> tuple[str, str, str]:
    """The part of ``reply`` that states its answer, and the texts before and after a box.

    In order: the last ``<answer>`` tag, then inside it (or in the whole reply after its reasoning)
    the last box or the line after the last ``####``, whichever comes later; else all of it.

    Raises:
        NotUnderstood: a mark that is not closed, or two boxes that are offered together.
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
        _refuse_second_box(text[:start], content)
        return content, text[:start], text[end:]
    if mark >= 0:
        return _after_mark(text[mark:].lstrip("#")), "", ""
    return text, "", ""


def is_box(reply: str) -> bool:
    """Whether ``reply`` is a box and nothing else."""
    return _BOX.match(reply.strip()) is not None


def _refuse_second_box(before: str, content: str) -> None:
    """Two boxes with nothing but a connective between them offer two answers."""
    boxes = list(_BOX.finditer(before))
    if not boxes:
        return
    previous = boxes[-1]
    end = closing_brace(before, previous.end() - 1)
    if end is None or before[previous.end() : end].strip() == content.strip():
        return
    if _BETWEEN_BOXES.fullmatch(before[end + 1 :]):
        raise NotUnderstood("several boxes")


def _after_mark(text: str) -> str:
    line, _, rest = text.partition("\n")
    if not rest.strip() or (_STARTS_WITH_ANSWER.match(line[:200]) and not _is_heading(line)):
        return line
    return rest


def _is_heading(line: str) -> bool:
    return _HEADING.fullmatch(line[:200]) is not None
