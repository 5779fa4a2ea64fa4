"""Find the final statement of a reply: its last number or expression, if it is unambiguous.

The answer of a reply is its last run of mathematical symbols. The answer is ambiguous if the run is
next to a negation ("not 14"), an alternative ("14 or 7"), a comparison ("more than 14") or a second
number of the same quantity ("3 hours 15 minutes"). Only English words are recognized.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace

from rlhf.reward_models.notation import units
from rlhf.reward_models.notation.boxes import (
    WORDS_AFTER_BOX,
    rest_of_formula_after_box,
    text_before_changes_box,
)
from rlhf.reward_models.notation.lexer import NotUnderstood, Token, tokens_of, word_set
from rlhf.reward_models.notation.marks import marked_answer
from rlhf.reward_models.notation.reader import TokenReader

FUNCTIONS = word_set(
    "sin cos tan cot sec csc asin acos atan arcsin arccos arctan sinh cosh tanh log ln "
    "lg exp sqrt cbrt abs gcd lcm max min floor ceil binom pi infty oo theta alpha beta "
    "gamma lambda phi mu omega sigma delta rho"
)
"""Words of plain text that are mathematical symbols."""

_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_CLAUSE_START = re.compile(
    r"[;:]|,\s*(?=(?:so|the|we|then|it|there|he|she|they)\b)|"
    r"\b(?:so|therefore|thus|hence|which means)\b",
    re.I,
)
_NEGATING_WORDS = re.compile(
    r"\b(?:not|never|no|neither|nor|cannot|without|except|excluding|unless|wrong|incorrect|false|"
    r"(?:any|every|all)\w*(?: \w+)? but|far from|unlike|instead of|rather than|other than|doubt|"
    r"hardly|impossible|untrue|nothing)\b|"
    r"n['’]t\b",
    re.I,
)
_REPORTING_WORDS = re.compile(
    r"\b(?:guess(?:ed|es)|(?:his|her|their|wrong|earlier|first) guess|believed|thought|claimed|"
    r"said|says|wrote|assumed|mistake|(?:could|might|may) (?:also )?be(?=\W*$))\b|"
    r"\b(?:people|students?|some|many|they) (?:might |may |would |often )?(?:guess|say|think)\b|"
    r"\b(?:suppose|assume|assuming|imagine|let(?= [a-z]\b(?!['’])|\s*$)|if(?!.*\bthen\b))[^,]*$",
    re.I,
)
"""Words with which a reply reports or assumes a number without stating that this is the answer."""
_LABEL_BEFORE_NUMBER = re.compile(
    r"\b(?:(?:no|nos|fig|eq|eqn)\.|step|figure|equation|problem|question|exercise|example)\s*\(?$",
    re.I,
)
_ALTERNATIVE_WORDS = re.compile(r"\b(?:or|either|versus|vs)\b", re.I)
_NO_ANSWER_AFTER = re.compile(
    r"(?:\b(?:as (?:many|few|much|little) as|"
    r"than|least|most|under|over|above|below|exceeds?|between|by|times|plus|mod|modulo|"
    r"through|until|till|up to|almost|nearly|maybe|perhaps|possibly|probably|likely|"
    r"minus|negative|out of|"
    r"(?:log|logarithm|roots?|half|thirds?|quarters?|twice|double|thrice|triple|squares?|cubes?|"
    r"percent|factorial|instead)(?: of)?(?: the)?)|"
    rf"\b(?:{_MONTHS})|[/^*:!—_]|[<>≤≥≠])\W*$",
    re.I,
)
_OPERAND_AFTER = re.compile(
    r"\b(?:of|after|before|beyond|past|follow(?:s|ing)|preced(?:es|ing)|from|near|close to|next to|"
    r"subtract|add|deduct|multiply|divide|increase|decrease|reduce|negate|round|halve)"
    r"(?: the)?\W*$",
    re.I,
)
"""Words after which a number is not the answer. There are two exceptions: the number is the result
of a calculation, or a phrase of ``_MEASURE_BEFORE_NUMBER`` precedes it."""
_MEASURE_BEFORE_NUMBER = re.compile(
    r"\b(?:total|sum|amount|average|mean|cost|price|profit|loss|gain|balance|income|salary|change|"
    r"savings|length|width|height|weight|distance|speed|area|volume|perimeter|radius|capacity|"
    r"lifespan|age|score|count|discount|commission|fee|rate|temperature|group|class|maximum|"
    r"minimum|answer|result|remainder|product) of\W*$",
    re.I,
)
_JOINED_TO_NUMBER = re.compile(
    r"\b(?:and|or|to|by|times|plus|minus|over|through|versus|vs)\W*$", re.I
)
_ANSWER_CUE = re.compile(
    r"=|\b(?:is|are|was|were|equals?|makes?|gives?|gets?|has|have|left|total|so|be)\b", re.I
)
_DOUBTING_WORDS = re.compile(
    r"\b(?:not|or|never|no|wrong|incorrect|false|instead|rather|actually|wait|maybe|perhaps|either|"
    r"squared|cubed|factorial|mod|modulo|hmm|fails?|failed|cannot|nope|excluded|ruled out|"
    r"rejected|untrue|impossible|unlikely|doubtful|probably|possibly|mistake|(?<!\bi )guess(?:ed)?|"
    r"too \w+)\b|n['’]t\b|\?",
    re.I,
)
_CALCULATION_BEFORE_BOX = re.compile(
    r"(?:[\d^+/±≤≥≠]|\w\s+[<>]\s?|(?:^|[\s$(])\d*[a-z]>|(?:^|[\s$(=\w}])[-−]|[\d$)}=]\s*[-−]\s?|"
    r"\\(?:cdot|times|div|pm|mp|neq?|[gl]eq?|[gl]t|log|ln)\s*|"
    r"(?:\\(?:sqrt|[dt]?frac|overline)(?:\[\w\])?|[\^_/])\{|(?<![\d.])0\.|\d(?:\{,\}|\\[,!]))\$?$"
)
_CALCULATION_AFTER_BOX = re.compile(
    r"[ $]*(?:[\^_](?=\d|\{(?!\\circ))|[-−+*/] ?(?=\d)|"
    r"\\(?:pi|cdot|times|div|pm|mp|sqrt|[dt]?frac)\b|or\s+[$\\(]*[\d-])|\d|"
    r"\$?(?:[.,~]|\{,\}|\\[,;:! ])\d|\$? \d{3}(?!\d)|"
    r"[ $]*(?:squared|cubed|factorial|plus|minus|times|multiplied|divided|"
    r"and (?:a|one) (?:half|third|quarter))\b",
    re.I,
)
_CHANGE_AFTER_BOX = re.compile(
    r"[(\s]*mod(?:ulo)?\b|\s*or (?:more|less|fewer)\b|\s*(?:to|[–—-])\s*\$?\d|"
    r"\s*and\s+\$?\d+/\d|[\s,]*no(?:,? wait\b|\W*\Z)",
    re.I,
)
_SCALE_OF_BOX = re.compile(
    rf"[ $]*(?:\\(?=%))?(?P<scale>%|(?:{'|'.join(units.SCALES)}|percent)\b)", re.I
)
_RESTATED_ANSWER = re.compile(
    r"\banswer\s+(?:is|should be|must be)[\s:$*\\(]*(-?\d[\d,]*(?:\.\d+)?)(?![\d%/\\^])", re.I
)
_DENIAL_AFTER_NUMBER = re.compile(
    r"[\s$()\]\\.,*]*(?:is|was|seems?|looks?)?\s*(?:not|n['’]t|wrong|incorrect|false)\b|"
    r"[\s$)\]\\*]*\?",
    re.I,
)
_VALUE_CHANGE_AFTER_NUMBER = re.compile(
    r"\s*(?:[ap]\.?\s?m\b|o['’]clock|:\s*\d)|"
    rf"\s*(?:of\s+)?(?:{_MONTHS})\b|"
    r"[\s-]*(?:and\s+(?:a|one|two|three)\s+)?(?:half|halves|thirds?|quarters?|fourths?|fifths?|"
    r"sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|millionths?)\b|"
    r"\s+(?:minus|plus|multiplied|divided|tens|hundreds|thousands|millions|billions|trillions|"
    r"dozens|doubled|tripled|halved|(?:degrees? )?below (?:zero|freezing)|basis|"
    r"lakhs?|crores?|bn|mn|mln|mil|grand|gross|thou|kilo|with|"
    r"less (?:one|two|three)|(?:in )?(?:binary|octal|hex(?:adecimal)?))\b",
    re.I,
)
"""Text after a number that turns it into a date, a time or a fraction, or changes its value."""
_CLAUSE_AFTER_NUMBER = re.compile(
    r"\s+(?:needs|has|should|must|would|could|might|may|will|"
    r"(?:is|was)\s+(?!(?:the|my|our|your|his|her|its|their|what|how|left|spent|right|correct)\b)\w+)\b",
    re.I,
)
"""Text after a number that is the subject of a clause."""
_CHANGE_AFTER_UNIT = re.compile(
    r"\s*!+(?=\s+(?-i:[a-z=+*/^-])|\w)|\s+(?:point|to the (?:power|\w+(?:th|rd)))\b|"
    r"(?-i:\s*B\.?C\.?E?\b)|"
    r"\s*(?:°|degrees?\b)\s*(?:[CF]\b|celsius|fahrenheit)?\s*(?:below|under)\W*\Z|"
    r"[\s°%]*(?:[^\W\d_]+[\s°%]+){0,2}?(?:"
    r"(?:below|under|beneath)\s+(?:zero|freezing|sea level|ground)\b|in the red\b|"
    r"(?:overdrawn|underground|negative|something)\b|"
    r"at (?:least|most|minimum|maximum)\b|and (?:a bit|change|some|something|counting|more)\b)|"
    r"[\s°%]*(?:[^\W\d_]+\s+)?(?:square|cubic|sq|cu|per|to|and|or|by|of|point)\W*\Z|\s+over\W*\Z",
    re.I,
)
"""Text after a number and up to two words of a unit that changes the value, or that is cut off."""
_LATEX_DEGREE = re.compile(r"\^?\s*\\circ\b")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textrm)\b|[{}$()]|\\[ ,;:!]")
_MARKDOWN_REPLACEMENTS = [
    (re.compile(r"<<[^<>\n]*>>"), ""),  # the calculator annotations of GSM8K
    (re.compile(r"^[ \t]*(?:```|~~~).*$", re.M), ""),
    (re.compile(r"[✓✔✅☑🎉]\ufe0f?"), " "),
    (re.compile(r"`"), ""),
    (re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])"), " "),
    (re.compile(r"(?<=[^\s*])\*\*(?![\w(*{\\-]|\.\d)"), " "),
    (re.compile(r"(?<![\w)\]}*])\*(?=[^\s*])(?=[^*\n]*[^\s*]\*(?![\w(]))"), " "),
    (re.compile(r"(?<=[^\s*(])\*(?=[\s.,;:!?]|$)"), " "),
    (re.compile(r"(?<![\w)\]}\\$_])(?<!\w\.)__?(?=[^\s_{}^])"), " "),
    (re.compile(r"(?<=[^\s_])__?(?![\w{\\])"), " "),
]
_WORDS_BEFORE_SIGN = word_set(
    "is are was were be being equals equal gives give makes make get gets to of by at from so thus "
    "therefore hence then have has becomes yields"
)
"""Words after which a spaced dash is a sign."""
_OPERATORS = ("=", "+", "-", "*", "/", "^", "<", ">", "<=", ">=", "!=")
_LATEX_SPACE = re.compile(r"\\[,;:! ]")
_QUOTE_CHARACTERS = "'\"“”‘’′″"
_NUM_SEARCHED_CHARACTERS = 80
"""Number of characters before a run that are searched for words that change its meaning."""
_MAX_RUN_TOKENS = 2000
_MAX_UNIT_TOKENS = 30
_MAX_PROSE_CHARACTERS = 5000
_SIGN_OR_BULLET = re.compile(r"^[ \t]*[-+][ \t]+[\d.]", re.M)
_SENTENCE_END = re.compile(r"[.?!]\s+|\n")
_LIST_MARK = re.compile(r"^[ \t]*(?:[-*•+]|\d+[.)])[ \t]+(?=\S)", re.M)


@dataclass(frozen=True)
class FinalStatement:
    """The final statement of a reply."""

    text: str
    """The last run of mathematical symbols."""
    words: str
    """The rest of the sentence after the run; it may contain a unit."""
    equations_complete: bool
    """Whether the sentence has no number before the run. If so, equations in the run are complete.
    """


@dataclass(frozen=True)
class AnswerSegment:
    """The part of a reply that contains the answer."""

    text: str
    """The part, without Markdown."""
    is_boxed: bool
    """Whether the part is a box."""
    is_formula: bool
    """Whether the part is a box with further symbols of its formula, so that no word around the
    answer may be ignored."""


def answer_segment(reply: str) -> AnswerSegment:
    """Return the part of a reply that contains the answer.

    Raises:
        NotUnderstood: A tag or a box is not closed, the text around a box contradicts it, or
            `without_markdown` rejects the text.
    """
    text, before, after, is_boxed = marked_answer(reply)
    is_formula = False
    if before or after:
        _check_text_around_box(before, text, after)
        # A repetition of the box at the end of a line does not change it.
        after = re.sub(rf"\A\s*=\s*{re.escape(text.strip())}(?=[\s$.)\]\\]*(?:\n|\Z))", "", after)
        if rest := rest_of_formula_after_box(before, after):
            text, is_formula = text + rest, WORDS_AFTER_BOX.fullmatch(rest) is None
        elif scaled := _SCALE_OF_BOX.match(after):
            text = rf"{text} \text{{{scaled['scale']}}}"
    if len(text) > _MAX_PROSE_CHARACTERS:  # only the end is needed; begin it with a sentence
        text = [*_SENTENCE_END.split(text[-_MAX_PROSE_CHARACTERS:], maxsplit=1), ""][1]
    text = units.with_powers_before_units(without_markdown(text))
    return AnswerSegment(text, is_boxed, is_formula)


def final_statement(segment: str, *, numbers_only: bool) -> FinalStatement:
    """Return the statement of the final answer in a segment.

    Args:
        segment: Text of the result of ``answer_segment``.
        numbers_only: Whether to ignore runs without numbers.

    Raises:
        NotUnderstood: There is no answer, or it is ambiguous.
    """
    tokens = _with_marked_products_of_units(tokens_of(segment))
    first, last = _last_run_indices(tokens, numbers_only)
    if _has_sign_word(tokens, first):
        first -= 1
    start, end = tokens[first].start, tokens[last].end
    run = segment[start:end]
    if tokens[last].prose and run.count("{") > run.count("}"):  # the brace of \\text is not a token
        end += len(segment) - end - len(segment[end:].lstrip("} "))
    _check_text_before_run(segment, tokens, first, run)
    is_quoted = any(mark in segment[:start] for mark in _QUOTE_CHARACTERS)
    if segment[end : end + 1] in tuple(_QUOTE_CHARACTERS) and not is_quoted:
        raise NotUnderstood("a prime, or a quotation mark that is not opened")
    _check_text_after_run(segment[end:], run)
    equations_complete = re.search(r"\d", _last_sentence(segment[:start])) is None
    return FinalStatement(segment[start:end], _first_sentence(segment[end:]), equations_complete)


def without_markdown(text: str) -> str:
    """Return ``text`` without Markdown.

    Raises:
        NotUnderstood: A part is struck out, or a plus or minus sign may be a bullet of a list.
    """
    if "~~" in text:
        raise NotUnderstood("a part is struck out")
    for pattern, replacement in _MARKDOWN_REPLACEMENTS:
        text = pattern.sub(replacement, text)
    if "\n" in text.strip():
        if _SIGN_OR_BULLET.search(text):
            raise NotUnderstood("a sign that may be a bullet of a list")
        text = _LIST_MARK.sub("", text)
    return text.strip()


def _with_marked_products_of_units(tokens: list[Token]) -> list[Token]:
    """Return the tokens; the words of a product of units after a number have the kind ``unit``.

    A single unit is no product: ``leading_unit_words`` finds it after the run.
    """
    changed = list(tokens)
    for i, token in enumerate(tokens):
        if token.kind != "number":
            continue
        reader = TokenReader(tokens[i + 1 : i + 1 + _MAX_UNIT_TOKENS])
        words = reader.take_known_units()
        if sum(word.isalpha() for word in words) < 2:
            continue
        for j in range(i + 1, i + 1 + reader.position):
            if tokens[j].kind == "word":
                changed[j] = replace(tokens[j], kind="unit")
    return changed


def _is_math_symbol(tokens: list[Token], i: int) -> bool:
    """Return whether token ``i`` can be in a run: a number, operator, command or variable."""
    token = tokens[i]
    if token.kind in ("number", "operator", "command", "unit", "currency", "delimiter", "unknown"):
        return not token.is_op(",", ";", ":", "!", "&") or _joins_symbols(tokens, i)
    if token.kind == "line":
        return _joins_symbols(tokens, i)
    if token.kind == "punctuation":
        before = _neighbors(tokens, i)[0]
        is_repeating = token.text == "..." and before.kind == "number"
        return is_repeating or _is_derivative_sign(before, token)
    if token.kind != "word":
        return False
    if token.prose and units.known_unit(token.text):
        return _neighbors(tokens, i)[0].kind in ("number", "operator")
    if token.math:
        return True
    return _is_variable_or_function(tokens, i)


def _neighbors(tokens: list[Token], i: int) -> tuple[Token, Token]:
    """Return the tokens before and after token ``i``; at the ends, a token of kind ``none``."""
    none = Token("none", "", -1, -1)
    before = tokens[i - 1] if i else none
    return before, tokens[i + 1] if i + 1 < len(tokens) else none


def _is_derivative_sign(before: Token, token: Token) -> bool:
    """Return whether the token is the apostrophe of a derivative, as in f'(x)."""
    letter = before.kind == "word" and len(before.text) == 1
    return token.text in "'’" and letter and not token.spaced


def _joins_symbols(tokens: list[Token], i: int) -> bool:
    """Return whether the separator ``i`` joins two symbols of one expression."""
    before, after = _neighbors(tokens, i)
    if "none" in (before.kind, after.kind):
        return False
    token = tokens[i]
    if token.math:
        return token.kind != "line"
    if token.kind == "line" or before.kind == "line" or after.kind == "line":
        return False
    if token.is_op(":", "!", "&"):
        return not token.spaced and not after.spaced and after.kind in ("number", "operator")
    plausible = ("number", "operator", "command", "delimiter", "currency")
    return before.kind in plausible and after.kind in plausible


def _is_variable_or_function(tokens: list[Token], i: int) -> bool:
    """Return whether the word ``i`` is a function, a variable or a product of variables."""
    token, word = tokens[i], tokens[i].text
    before, after = _neighbors(tokens, i)
    glued_before = not token.spaced and before.kind in ("number", "operator", "command")
    glued_after = not after.spaced and (
        after.kind == "number" or after.is_op(*_OPERATORS, "_", "(")
    )
    if word.lower() in FUNCTIONS and not token.prose:
        opens = after.kind in ("number", "command") or after.is_op("(", "*", "/", "^", "+", "-")
        return opens or glued_before or word in ("pi", "oo", "theta")
    next_to_operator = before.is_op(*_OPERATORS) or after.is_op(*_OPERATORS)
    if len(word) == 1:
        return word not in "aAI" or glued_before or glued_after or next_to_operator
    if before.kind == "number" and not token.spaced:
        return True
    if len(word) > 3 or word.lower() in units.NOT_UNITS:
        return False
    opened = glued_before and not before.is_op("-", "(", "[", "{", ")")
    closed = glued_after and not after.is_op("-", "(", "/", "+")
    return opened or closed or (next_to_operator and (glued_after or glued_before))


def _last_run_indices(tokens: list[Token], numbers_only: bool) -> tuple[int, int]:
    """Return the indices of the first and the last token of the last run that can be an answer.

    Raises:
        NotUnderstood: There is no such run, or it is too long.
    """
    end = len(tokens) - 1
    while end >= 0:
        if not _is_math_symbol(tokens, end):
            end -= 1
            continue
        start = _run_start(tokens, end)
        if _can_be_answer(tokens[start : end + 1], numbers_only):
            start, end = _extended_run_indices(tokens, start, end)
            if end - start > _MAX_RUN_TOKENS:
                raise NotUnderstood(f"longer than {_MAX_RUN_TOKENS} symbols")
            return _trimmed_run_indices(tokens, start, end)
        end = start - 1
    raise NotUnderstood("no number" if numbers_only else "no mathematics")


def _can_be_answer(run: list[Token], numbers_only: bool) -> bool:
    """Return whether a run has a number, or, if not ``numbers_only``, a word or a command."""
    if any(token.kind == "number" or token.text.startswith("number") for token in run):
        return True
    return not numbers_only and any(token.kind in ("word", "command") for token in run)


def _trimmed_run_indices(tokens: list[Token], start: int, end: int) -> tuple[int, int]:
    """Return the indices of the ends of a run without delimiters, separators and open brackets."""
    while end > start and (
        tokens[end].kind == "delimiter"
        or tokens[end].is_op(",", ";", ":")
        or _ends_with_unpaired_bracket(tokens, start, end)
    ):
        end -= 1
    while end > start and tokens[end].is_op("(", "["):
        end -= 1  # the bracket begins a remark after the answer
    while start < end and tokens[start].kind == "delimiter":
        start += 1
    return start, end


def _ends_with_unpaired_bracket(tokens: list[Token], start: int, end: int) -> bool:
    """Return whether the run ends with a closing bracket that was opened before the run."""
    if not tokens[end].is_op(")"):
        return False
    run = tokens[start : end + 1]
    closed = sum(t.is_op(")", "]") for t in run)
    return closed > sum(t.is_op("(", "[") for t in run)


def _extended_run_indices(tokens: list[Token], start: int, end: int) -> tuple[int, int]:
    """Extend a run by earlier runs if only "or", "and" or commas separate them; return indices."""
    while True:
        position = start - 1
        while position >= 0 and (
            tokens[position].is_op(",", ";")
            or tokens[position].kind in ("delimiter", "line")
            or (tokens[position].kind == "word" and tokens[position].text.lower() in ("or", "and"))
        ):
            position -= 1
        joints = {token.kind for token in tokens[position + 1 : start]}
        only_lines = "line" in joints and joints <= {"delimiter", "line"}
        if position < 0 or not joints or only_lines or not _is_math_symbol(tokens, position):
            return start, end
        start = _run_start(tokens, position)


def _run_start(tokens: list[Token], position: int) -> int:
    """Return the index of the first token of the run of symbols around ``position``."""
    while position > 0 and _is_math_symbol(tokens, position - 1):
        position -= 1
    return position


def _first_sentence(text: str) -> str:
    """Return the text up to the end of the first sentence."""
    return re.split(r"[.?!](?:\s|$)|\n", text, maxsplit=1)[0]


def _last_sentence(text: str) -> str:
    """Return the last sentence of a text; it may be incomplete."""
    return _SENTENCE_END.split(text)[-1]


def check_is_asserted(before: str, *, is_calculation: bool = False) -> None:
    """Check that the words before an answer do not deny, report or assume it.

    Args:
        before: The text before the answer; only its last clause is checked.
        is_calculation: Whether the answer is the result of a calculation. If it is, only a negation
            is rejected.

    Raises:
        NotUnderstood: The clause negates the answer, reports it or assumes it.
    """
    clause = _CLAUSE_START.split(_last_sentence(before))[-1]
    if _NEGATING_WORDS.search(clause):
        raise NotUnderstood("a negation before the answer")
    if not is_calculation and _REPORTING_WORDS.search(clause):
        raise NotUnderstood("an answer that is reported or assumed")


def _check_text_before_run(text: str, tokens: list[Token], first: int, run: str) -> None:
    """Raise NotUnderstood if the text before the run changes its meaning.

    Args:
        text: The whole text.
        tokens: Its tokens.
        first: Index of the first token of the run.
        run: Text of the run.
    """
    before = _LATEX_SPACE.sub("  ", text[: tokens[first].start])
    sentence = _last_sentence(before)
    clause = _CLAUSE_START.split(sentence)[-1]
    check_is_asserted(sentence, is_calculation=re.search(r"\d.*=", run) is not None)
    if _LABEL_BEFORE_NUMBER.search(before[-_NUM_SEARCHED_CHARACTERS:]):
        raise NotUnderstood("a number that is a label, as in step 3")
    near = clause[-_NUM_SEARCHED_CHARACTERS:]
    is_object = (
        "=" not in run and _OPERAND_AFTER.search(near) and not _MEASURE_BEFORE_NUMBER.search(near)
    )
    if is_object or _NO_ANSWER_AFTER.search(near):
        raise NotUnderstood("words before the answer that change it")
    previous = next((t for t in reversed(tokens[:first]) if t.kind == "number"), None)
    if _ALTERNATIVE_WORDS.search(clause) and (
        previous is not None or re.match(r"\W*or\b", sentence, re.I) or "either" in clause.lower()
    ):
        raise NotUnderstood("several candidates")
    if previous is not None:
        _reject_part_or_alternative_number(before[previous.end :], previous, tokens[first])
    if _is_dash_after_word(tokens, first):
        raise NotUnderstood("a dash that may be a sign")
    glued = first > 0 and tokens[first - 1].end == tokens[first].start
    if glued and tokens[first - 1].kind in ("word", "number"):
        raise NotUnderstood("a number that is part of a name")


def _is_dash_after_word(tokens: list[Token], first: int) -> bool:
    """Return whether the run begins with a spaced dash after a word, as in ``Answer - 8``."""
    if first == 0 or first + 1 >= len(tokens) or not tokens[first].is_op("-"):
        return False
    word = tokens[first - 1]
    is_word = word.kind == "word" and len(word.text) > 1 and not word.math
    is_spaced = tokens[first].spaced and tokens[first + 1].spaced
    return is_word and is_spaced and word.text.lower() not in _WORDS_BEFORE_SIGN


def _has_sign_word(tokens: list[Token], first: int) -> bool:
    """Return whether "minus" or "negative" precedes the run as a sign, not as a subtraction."""
    if first == 0 or tokens[first - 1].text.lower() not in ("minus", "negative"):
        return False
    return first == 1 or tokens[first - 2].kind != "number"


def _reject_part_or_alternative_number(between: str, previous: Token, token: Token) -> None:
    """Raise NotUnderstood if the number before the run may be a part or an alternative of it.

    Args:
        between: The text between the previous number and the run.
        previous: The previous number.
        token: The first token of the run.
    """
    if not any(c.isalpha() for c in between):
        if token.kind == "number" and previous.value == token.value:
            return
        raise NotUnderstood("several numbers in a row")
    if _last_sentence(between) != between:
        return
    clause = _CLAUSE_START.split(between)[-1]
    if _JOINED_TO_NUMBER.search(clause[-_NUM_SEARCHED_CHARACTERS:]) and not _ANSWER_CUE.search(
        clause
    ):
        raise NotUnderstood("several candidates")
    words = clause.strip(" ,.")
    if any(units.known_unit(word) for word in (words, words.removesuffix("and").strip())):
        raise NotUnderstood("a compound quantity")


def _check_text_after_run(rest: str, run: str) -> None:
    """Raise NotUnderstood if the text after the run changes its meaning."""
    if re.match(r"\.[a-z_\d]", rest):
        raise NotUnderstood("a symbol that is part of a name")
    if _DOUBTING_WORDS.search(rest):
        raise NotUnderstood("words after the answer that cast doubt on it")
    rest = re.sub(r"\b(sq|cu)\.", r"\1", rest)  # the period ends no sentence
    sentence = rest if rest.lstrip().startswith("!") else _first_sentence(rest.split(",")[0])
    unit = re.search(r"\D*\Z", run)
    sentence = _LATEX_TEXT.sub(" ", (unit[0] if unit else "") + sentence)
    sentence = _LATEX_DEGREE.sub("°", sentence)
    changes = (_VALUE_CHANGE_AFTER_NUMBER, _CLAUSE_AFTER_NUMBER)
    if any(change.match(rest) for change in changes) or _CHANGE_AFTER_UNIT.match(sentence):
        raise NotUnderstood("words after the answer that change it")


def _check_text_around_box(before: str, content: str, after: str) -> None:
    """Raise NotUnderstood if the text around a box contradicts its content."""
    clause = _CLAUSE_START.split(_last_sentence(before))[-1]
    if _NEGATING_WORDS.search(clause):
        raise NotUnderstood("a negation before the answer")
    words = re.sub(r"\A(?:\$|\\[)\]])+", "", after)
    if (
        text_before_changes_box(before)
        or _CALCULATION_BEFORE_BOX.search(before)
        or _CALCULATION_AFTER_BOX.match(after)
        or _VALUE_CHANGE_AFTER_NUMBER.match(words)
        or _CHANGE_AFTER_UNIT.match(words.partition("\n")[0])
        or _CHANGE_AFTER_BOX.match(words)
    ):
        raise NotUnderstood("symbols next to the box that change it")
    if restated := _RESTATED_ANSWER.search(after):
        with suppress(ValueError):  # the box is not a plain number
            boxed, stated = (float(t.replace(",", "")) for t in (content, restated[1]))
            if boxed != stated:
                raise NotUnderstood("another answer after the box")
    if _DENIAL_AFTER_NUMBER.match(after):
        raise NotUnderstood("words after the answer that cast doubt on it")
