"""Fenced code blocks of a Markdown reply."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.reward_models.notation.marks import after_thinking

_FENCE = re.compile(r"^([ \t]*)(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?(`{3,}|~{3,})[ \t]*(.*?)[ \t]*$")
_LANGUAGE = re.compile(r"\{?\s*\.?([\w+#-]*)")
_PYTHON = {"python", "python3", "python2", "py", "py3", "ipython", "pycon"}


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    """First word of the info string, in lower case; empty if there is none."""
    code: str
    """The lines without the indentation of the fence."""


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a text in order (CommonMark 4.5).

    A fence is closed by a line that consists of at least as many of the same characters. A block
    that is not closed ends with the text. Any indentation is accepted, as within a list.
    """
    blocks: list[Block] = []
    opened: tuple[int, str, str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        match = _FENCE.match(line)
        if opened is None:
            if match and not (match.group(2)[0] == "`" and "`" in match.group(3)):
                opened, lines = (len(match.group(1)), match.group(2), match.group(3)), []
        elif match and _closes(match, opened[1]):
            blocks.append(_block(opened, lines))
            opened = None
        else:
            lines.append(line)
    return [*blocks, _block(opened, lines)] if opened is not None else blocks


def _closes(match: re.Match[str], fence: str) -> bool:
    mark = match.group(2)
    return mark[0] == fence[0] and len(mark) >= len(fence) and not match.group(3)


def _block(opened: tuple[int, str, str], lines: list[str]) -> Block:
    indent, _, info = opened
    language = _LANGUAGE.match(info)
    code = "".join(f"{_dedent(line, indent)}\n" for line in lines)
    return Block(language.group(1).lower() if language else "", code)


def _dedent(line: str, indent: int) -> str:
    blanks = len(line) - len(line.lstrip(" \t"))
    return line[min(blanks, indent) :]


def code_in(reply: str) -> str:
    """The program in a reply: its last Python block, else its last block without a language.

    Reasoning in ``<think>`` is ignored. Without such a block, the whole reply is the program.
    """
    text = after_thinking(reply)
    blocks = fenced_blocks(text)
    python = [block for block in blocks if block.language in _PYTHON]
    candidates = python or [block for block in blocks if not block.language]
    return candidates[-1].code if candidates else text
