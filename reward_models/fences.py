"""Find fenced code blocks in a Markdown reply."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.reward_models.notation.marks import after_thinking

_FENCE = re.compile(r"^([ \t]*)(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?(`{3,}|~{3,})[ \t]*(.*?)[ \t]*$")
_LANGUAGE = re.compile(r"\{?\s*\.?([\w+#-]*)")
_PYTHON = {"python", "python3", "python2", "py", "py3", "ipython", "pycon"}


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
    is at least as long. A block that is not closed ends at the end of the text. Fences may have any
    indentation, because blocks can be in a list.
    """
    blocks: list[FencedBlock] = []
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        match = _FENCE.match(line)
        if opening is None:
            if match and not (match.group(2)[0] == "`" and "`" in match.group(3)):
                opening, lines = match, []
        elif match and _closes_block(match, opening):
            blocks.append(_make_block(opening, lines))
            opening = None
        else:
            lines.append(line)
    return [*blocks, _make_block(opening, lines)] if opening is not None else blocks


def _closes_block(match: re.Match[str], opening: re.Match[str]) -> bool:
    fence, first_fence = match.group(2), opening.group(2)
    return fence.startswith(first_fence) and not match.group(3)


def _make_block(opening: re.Match[str], lines: list[str]) -> FencedBlock:
    language = _LANGUAGE.match(opening.group(3))
    indentation = re.compile(rf"[ \t]{{0,{len(opening.group(1))}}}")
    code = "".join(indentation.sub("", line, count=1) + "\n" for line in lines)
    return FencedBlock(language.group(1).lower() if language else "", code)


def code_of_reply(reply: str) -> str:
    """Return the program in a reply, without the reasoning in ``<think>``.

    The program is the last Python block. If there is none, it is the last block without a language,
    and if there is no such block, the whole reply.
    """
    text = after_thinking(reply)
    blocks = fenced_blocks(text)
    python = [block for block in blocks if block.language in _PYTHON]
    candidates = python or [block for block in blocks if not block.language]
    return candidates[-1].code if candidates else text
