"""Find fenced code blocks in a Markdown reply."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.common.text import after_thinking

_QUOTE = r" {0,3}>[ \t]?"
_INDENTATION = r"[ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?"
_FENCE = re.compile(rf"^((?:{_QUOTE})*)({_INDENTATION})(`{{3,}}|~{{3,}})[ \t]*(.*?)[ \t]*$")
_LINE_END = re.compile(r"\r\n?|\n")  # other line separators can be in the strings of a program
_ANSWER = re.compile(r"^[ \t]*<answer>(.*)</answer>\s*\Z", re.DOTALL | re.MULTILINE)
_SESSION = re.compile(r"\s*>>> ")
_LANGUAGE = re.compile(r"\{?\s*\.?([\w+#-]*)")
_PYTHON = {"python", "python3", "python2", "py", "py3", "ipython", "pycon"}
_MAX_CLOSING_INDENTATION = 3
_THINK_TAG = re.compile(r"</?think>")
_QUOTE_MARK = re.compile(r"[\"`]|(?<!\w)'|'(?!\w)")
_MAX_THINK_TAGS = 100
_MAX_REASONING_BLOCKS = 8


@dataclass(frozen=True)
class FencedBlock:
    """A fenced code block."""

    language: str
    """First word after the opening fence, in lower case; empty if there is none."""
    code: str
    """The lines without the indentation of the fence."""


def fenced_blocks(text: str) -> list[FencedBlock]:
    """Return the fenced blocks of a text in order (CommonMark 4.5).

    A block is closed by a line that consists of the same fence character as the opening fence and
    is at least as long. The line may have up to three characters more indentation than the opening
    fence, so a fence in a docstring does not close the block of its program. If no line closes the
    block, the indentation is not limited. A block that is not closed ends at the end of the text,
    or of the quotation that contains it. Blocks may be in a list or in a quotation.
    """
    lines = _LINE_END.split(text.removeprefix("\ufeff"))
    return [_make_block(opening, body) for _, opening, body in _fences(lines)]


def _fences(lines: list[str]) -> Iterator[tuple[int, re.Match[str], list[str]]]:
    """Yield the index of the first line after the fence, the fence and the lines of each block."""
    position = 0
    while position < len(lines):
        opening = _FENCE.match(lines[position])
        position += 1
        if opening and not (opening.group(3)[0] == "`" and "`" in opening.group(4)):
            body = _lines_of_quotation(lines[position:], opening.group(1).count(">"))
            end = _closing_line_index(body, opening)
            yield position, opening, body[:end]
            position += end + 1


def _lines_of_quotation(lines: list[str], depth: int) -> list[str]:
    """Return the lines of a quotation of this depth, without its marks; all lines for depth 0."""
    if not depth:
        return lines
    mark = re.compile(rf"(?:{_QUOTE}){{{depth}}}")
    content = []
    for line in lines:
        match = mark.match(line)
        if match is None:
            break
        content.append(line[match.end() :])
    return content


def _closing_line_index(lines: list[str], opening: re.Match[str]) -> int:
    """Return the index of the line that closes a block, or the number of lines."""
    closing = re.compile(rf"^([ \t]*){re.escape(opening.group(3))}{opening.group(3)[0]}*[ \t]*$")
    limit = len(opening.group(2)) + _MAX_CLOSING_INDENTATION
    first = len(lines)
    for index, line in enumerate(lines):
        if match := closing.match(line):
            if len(match.group(1)) <= limit:
                return index
            first = min(first, index)
    return first


def _make_block(opening: re.Match[str], lines: list[str]) -> FencedBlock:
    language = _LANGUAGE.match(opening.group(4))
    indentation = re.compile(rf"[ \t]{{0,{len(opening.group(2))}}}")
    code = "".join(indentation.sub("", line, count=1) + "\n" for line in lines)
    return FencedBlock(language.group(1).lower() if language else "", code)


def code_of_reply(reply: str) -> str:
    """Return the program in a reply, without the reasoning in ``<think>``.

    If the reply ends with an ``<answer>`` tag, only its content is searched. The program is the
    last Python block. If there is none, it is the last block without a language, and if there is no
    such block, the whole text. Blocks with an interactive session (``>>> ``) are skipped.
    """
    text = without_reasoning(reply)
    if tagged := _ANSWER.search(text):
        text = tagged.group(1)
    blocks = [block for block in fenced_blocks(text) if not _SESSION.match(block.code)]
    python = [block for block in blocks if block.language in _PYTHON]
    candidates = python or [block for block in blocks if not block.language]
    return candidates[-1].code if candidates else text


def without_reasoning(reply: str) -> str:
    """Return the text after the last closed reasoning; tags in a program are part of the program.

    Reasoning begins with ``<think>``, or at the start of the reply, and ends with ``</think>``.
    The text ends before a ``<think>`` that is not closed.
    """
    text = reply
    for _ in range(_MAX_REASONING_BLOCKS):
        tag = first_think_tag_outside_code(text)
        if tag is None:
            return text
        end = tag.end() if tag.group() == "</think>" else text.find("</think>", tag.end())
        if end < 0:
            return text[: tag.start()]
        text = text[end:].removeprefix("</think>")
    return after_thinking(text)


def first_think_tag_outside_code(text: str) -> re.Match[str] | None:
    """Return the first tag of reasoning in a reply; None if all tags are parts of programs.

    A tag in a fenced block, or after an opening quotation mark in its line, is part of a program.
    The exception is the first tag of the text if it is ``</think>`` at the end of a line: it ends
    reasoning in which a block was not closed.
    """
    tags = list(itertools.islice(_THINK_TAG.finditer(text), _MAX_THINK_TAGS))
    if not tags:
        return None
    lines, starts, position = _LINE_END.split(text), [], 0
    for line in lines:
        starts.append(position)
        position += len(line)
        position += 2 if text.startswith("\r\n", position) else 1
    blocks = [(first, first + len(body)) for first, _, body in _fences(lines)]
    for tag in tags:
        index = bisect.bisect_right(starts, tag.start()) - 1
        before = text[starts[index] : tag.start()]
        in_block = any(first <= index < end for first, end in blocks)
        is_quoted = len(_QUOTE_MARK.findall(before)) % 2 == 1
        if not in_block and not is_quoted:
            return tag
        ends_line = not lines[index][tag.end() - starts[index] :].strip()
        if tag is tags[0] and tag.group() == "</think>" and ends_line:
            return tag
    return None
