"""Find the symbols around a box that belong to its formula, as ``+ 1`` in ``$\\boxed{4} + 1$``."""

from __future__ import annotations

import re
import unicodedata

from rlhf.reward_models.notation import units

_MATH_OPENING = re.compile(r"(?<!\\)\$\$?|\\[(\[]|\\begin\{(?:align|equation|gather)\w*\*?\}")
_MATH_CLOSING = re.compile(r"(?<!\\)\$\$?|\\[)\]]|\\end\b")
_MATH_DELIMITER = re.compile(r"(?:\$\$?|\\[(\[]|\\begin\{\w+\*?\})\Z")
_END_IN_MATH = re.compile(r"(?<!\\)\$|\\[)\]]|\\end\b|\\\\|&|\n[ \t]*\n|<(?=[/|!a-zA-Z])")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textbf)\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"\n|[.!?]\s|(?:^|\s)[a-z]{2,}(?=[\s,.;:])", re.I)
"""Text between dollar signs that is no mathematics."""
_MAX_FORMULA = 500
"""Number of characters before or after a box that are searched, so that the time is limited."""
_QUOTES = "\"'“”‘’`"
_END_IN_TEXT = re.compile(
    r"\n|\$|\\[()\[\]]|\\\\|\\end\b|\\begin\b|[#~]|<(?=[/|!a-zA-Z])|\|(?!\s*\d)|"
    # White space before a word, a remark or Markdown.
    r"\s+(?=[^\W\d_][^\W\d_'’]|[aAI]\b|Q\.|[-–—]+\s+[^\W\d_]|[(\[*_\"“‘]+[^\W\d_]{2})|"
    # The end of a sentence, of a bracket or of Markdown.
    r"(?<!\.)[.,;:?](?=[\s*_)\]}]|$)|!+(?=\s*$|\s+[A-Z]|[*_)\]}])|[*_]+(?=[\s.,;:!?)\]]|$)"
)
_SPACE = r"(?:\s|\\[,;:! ]|\\q?quad\b|\\hfill\b|\\(?:black)?square\b|\\checkmark\b)*"
_TRAILING = re.compile(rf"{_SPACE}(?<![.,;:])[.,;:]?{_SPACE}\Z")
WORDS_AFTER_BOX = re.compile(
    r"(?:\s|\\[,;:! ]|\\q?quad\b)*"
    r"(?:[^\W\d_]{2,}|\\(?:text|mathrm|mbox|textrm)\{[^{}\n]*\})"
)
"""Words joined to a box, or words in ``\\text{...}`` after it."""
_OPENING = re.compile(
    r"(?:\s|\\[,;:! ]|\\q?quad\b|\\(?:left|[bB]igg?|displaystyle|[lL]arge|LARGE|[hH]uge)\b|"
    r"\\color\{\w+\}|\\color(?=\{)|\\(?:text|math)?(?:bf|rm|it|color)\b(?:\{\w+\})?|[({\[]|\\?[$€£])*\Z"
)
"""Brackets, spaces, sizes, colors and currencies directly before a box."""
_STATES_BOX = re.compile(
    r"(?:\A\s*|[=≈≡:⇒→∈∴]|\\(?:approx|equiv|cong|in|to|(?:[rR]|[lL]ongr|[lL]eftr)ightarrow|"
    r"implies|iff|therefore|colon|doteq)|\\(?:text|mathrm|textbf|mbox|textrm)\{[^{}]*\})\s*\Z"
)
"""End of a formula that states the value of the box after it."""
_CALCULATION_IN_TEXT = re.compile(
    r"\b(?:than|minus|negative|plus|times|modulo|mod|divided by|multiplied by|instead of|out of|"
    r"(?:half|thirds?|quarters?|twice|double|thrice|triple|roots?|squares?|cubes?|logarithm|percent)"
    r"(?: of)?(?: the)?)[\s*_(]*\Z|"
    r"\b(?:between|from)\s[\s$]*-?[\d.]+[\s$]*(?:and|to)\s*\Z|\d[\s$]*(?:or|to|[–—])\s*\Z|~~\s*\Z",
    re.I,
)
"""Words before a box without delimiters that change its value, or that give an alternative."""


def rest_of_formula_after_box(before: str, after: str) -> str:
    """Return the symbols after a box up to the end of its formula; "" if there are none.

    Without dollar signs or other delimiters around the box, the formula ends at the first word,
    bracketed remark, punctuation mark or line break. If the symbols are a unit, they are returned
    in ``\\text{...}``.

    Args:
        before: Text before the box.
        after: Text after the box.
    """
    after = re.sub(r"[ \t]+", " ", after[:_MAX_FORMULA])
    in_text = _start_of_open_math(before) is None
    end = _END_IN_TEXT if in_text else _END_IN_MATH
    starts = (match.start() for match in end.finditer(after))
    rest = after[: next((i for i in starts if not _is_in_braces(after, i)), None)]
    rest = rest[: _unpaired_closing_bracket_index(rest)]
    quote = before.rstrip("$\\( *_")[-1:]
    if quote and quote in _QUOTES and rest[:1] in tuple(_QUOTES):
        rest = ""
    rest = rest[: next((i for i, c in enumerate(rest) if _is_pictograph(c)), None)]
    rest = _TRAILING.sub("", rest)
    is_unit = in_text and rest.strip() != "K" and units.known_unit(rest.strip())
    return rf"\text{{{rest}}}" if is_unit else rest


def text_before_changes_box(before: str) -> bool:
    """Return whether the text before a box changes its value, as in ``$2\\boxed{4}$``.

    A formula may state the value of the box, as in ``$x = \\boxed{4}$``.
    """
    start = _start_of_open_math(before)
    text = before if start is None else _MATH_DELIMITER.sub("", before[:start])
    if start is None or not before[start:].strip():
        return _CALCULATION_IN_TEXT.search(text[-100:]) is not None
    formula = re.split(r"\\\\|&", before[start:][-_MAX_FORMULA:])[-1]
    return _STATES_BOX.search(_OPENING.sub("", formula)) is None


def _start_of_open_math(before: str) -> int | None:
    """Return where the mathematics begins that is open at the end of a text; None if none is open.

    A dollar sign before words or the end of a sentence is that of a price.
    """
    start, position = None, 0
    while match := (_MATH_OPENING if start is None else _MATH_CLOSING).search(before, position):
        position = match.end()
        start = position if start is None else None
    if start is None or before[start - 2 : start] == "$$" or before[start - 1] != "$":
        return start
    return None if _PROSE.search(_COMMAND.sub("", before[start:])) else start


def _is_in_braces(text: str, position: int) -> bool:
    """Return whether a brace is open before a position."""
    return text.count("{", 0, position) > text.count("}", 0, position)


def _unpaired_closing_bracket_index(text: str) -> int | None:
    """Return the index of the first bracket whose opening bracket is before the text, or None."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 and text[i - 1 : i] != "\\":  # a box in a set is a part of the answer
            return i
    return None


def _is_pictograph(character: str) -> bool:
    """Return whether a character is a check mark, an emoji or a similar symbol."""
    return unicodedata.category(character) == "So" and character not in "°℃℉"
