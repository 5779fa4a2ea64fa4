"""Split an answer in plain text, Markdown, LaTeX or Unicode into tokens."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction


def word_set(text: str) -> frozenset[str]:
    """Return the set of words of ``text``."""
    return frozenset(text.split())


MAX_TEXT = 20_000
"""Maximum length of a text, in characters."""
MAX_DIGITS = 1000
"""Maximum number of digits of a number."""
MAX_EXPONENT = 1000
"""Maximum absolute value of the exponent of a number such as 1e6."""


class NotUnderstood(Exception):
    """Error for a text that cannot be parsed; the message gives the reason."""


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    kind: str
    """``number``, ``word``, ``command`` (of LaTeX), ``operator``, ``currency``, ``delimiter``
    (around mathematics, such as $), ``line`` (a line break), ``punctuation`` or ``unknown``."""
    text: str
    """Normalized text: for example, every minus sign is ``-``."""
    start: int
    """Index of the first character in the text."""
    end: int
    """Index after the last character in the text."""
    spaced: bool = False
    """Whether white space or an ignored command such as ``\\left`` precedes the token."""
    math: bool = False
    """Whether the token is in math mode, which excludes the content of ``\\text{...}``."""
    prose: bool = False
    """Whether the token is inside ``\\text{...}`` or a similar command."""
    value: Fraction = Fraction(0)
    """Value of a number; 0 for other tokens."""
    groups: tuple[str, ...] = ()
    """Groups of digits that commas separate, as in 3,100. Between brackets, such a token is read as
    a list of numbers, unless a later group begins with 0. The tuple is empty for other tokens."""

    def is_op(self, *texts: str) -> bool:
        """Return whether the token is one of these operators."""
        return self.kind == "operator" and self.text in texts

    def is_command(self, *names: str) -> bool:
        """Return whether the token is one of these LaTeX commands."""
        return self.kind == "command" and self.text in names


_THIN_SPACES = "\u2006\u2007\u2008\u2009\u200a\u202f\u00a0"
_SPACING_COMMAND = (
    r"\\(?:(?:thin|med|thick|nobreak|en)space(?![A-Za-z])[ ]*|[hm]space\*?\{[^{}\\]{0,20}\})"
)
_GROUP_SEPARATOR = rf"(?:,\\!|\{{,\}}|\\[,;:! ]|,|~|{_SPACING_COMMAND}|[{_THIN_SPACES} '’_])"
_GROUPED_NUMBER = re.compile(
    rf"\d{{1,3}}(?P<mark>{_GROUP_SEPARATOR})\d{{3}}(?:(?P=mark)\d{{3}})*(?!\d)"
)
_EUROPEAN_NUMBER = re.compile(
    r"\d{1,3}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,}|(?:[ ]\d{3})+,\d{1,2})(?![\d.])"
)
_PLAIN_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_REPEATING_DECIMAL = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\{(\d+)\}")
_FRACTION_PART = re.compile(r"\.\d+")
_DOLLAR_PREFIX = re.compile(r"(US|CA|AU|NZ|HK|[ACS])\\?\$(?=\s?\.?\d)")
_EXPONENT = re.compile(r"[eE]([-+−]?)0*+(\d*+)(?<=\d)(?!\w)(?!\.\d)")
_SPACING = re.compile(_SPACING_COMMAND)
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?|\\(.)", re.DOTALL)
_DIGIT_LIKE_CHARACTERS = "⁰¹²³⁴⁵⁶⁷⁸⁹½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_LETTER = rf"[^\W\d_{_DIGIT_LIKE_CHARACTERS}]"
_WORD = re.compile(rf"{_LETTER}+(?:['’]{_LETTER}+)*")
_SPACE = re.compile(rf"[ \t\r\f\v{_THIN_SPACES}]+")
_SUPERSCRIPT_NUMBER = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_SUPERSCRIPT_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_FULL_WIDTH_FORMS = {0xFEE0 + code: code for code in range(ord("!"), ord("~") + 1)}
_TEXT_COMMANDS = word_set(
    "text textbf textit textrm textnormal mbox mathrm mathbf hbox operatorname mathit mathsf "
    "textsf emph boldsymbol mathbb mathcal"
)
_IGNORED_COMMANDS = word_set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle quad qquad limits "
    "nolimits middle boxed fbox"
)


def _parse_replacements(text: str) -> dict[str, str]:
    """Parse pairs ``a→b`` that are separated by white space; return a -> b."""
    pairs = [pair.partition("→") for pair in text.split()]
    return {first: second for first, _, second in pairs}


_COMMAND_ALIASES = _parse_replacements(
    "dfrac→frac tfrac→frac cfrac→frac leqslant→le geqslant→ge leq→le geq→ge neq→ne lbrace→{ "
    "rbrace→} ldots→dots cdots→dots varnothing→emptyset degree→circ lvert→vert rvert→vert mid→vert "
    "dbinom→binom tbinom→binom arcsin→asin arccos→acos arctan→atan bar→overline land→and lor→or"
)
_OPERATOR_COMMANDS = _parse_replacements(
    "cdot→* times→* ast→* div→/ le→<= ge→>= ne→!= lt→< gt→> pm→+- mp→-+ cup→cup cap→cap in→in "
    "approx→~ simeq→~ sim→~ vert→| setminus→setminus colon→: equiv→equiv"
)
_OPERATOR_CHARACTERS = _parse_replacements(
    "−→- –→- ‐→- ‑→- ﹣→- －→- ×→* ·→* ⋅→* ∙→* ÷→/ ∕→/ ⁄→/ ≤→<= ≥→>= ⩽→<= ⩾→>= ≠→!= ±→+- ∓→-+ "
    "∪→cup ∩→cap ∈→in ≈→~ °→deg º→deg ＝→= ＋→+ （→( ）→) ，→, ％→%"
)
_SYMBOL_COMMANDS = _parse_replacements(
    "√→sqrt π→pi ∞→infty ∅→emptyset θ→theta α→alpha β→beta λ→lambda φ→phi μ→mu"
)
_DOUBLE_OPERATORS = _parse_replacements("**→^ ==→= <=→<= >=→>= !=→!= =>→=> ->→-> //→//")
_ESCAPED_CHARACTERS = {
    "{": ("operator", "\\{"),
    "}": ("operator", "\\}"),
    "%": ("operator", "%"),
    "|": ("operator", "|"),
    "\\": ("operator", "\\\\"),
    "$": ("currency", "$"),
}


def tokens_of(text: str, *, in_math_mode: bool = False) -> list[Token]:
    """Split ``text`` into tokens, in time linear in its length.

    Args:
        text: An answer or a whole reply.
        in_math_mode: Whether to treat the whole text as if it were between math delimiters.

    Raises:
        NotUnderstood: The text is longer than ``MAX_TEXT`` characters.
    """
    if len(text) > MAX_TEXT:
        raise NotUnderstood(f"longer than {MAX_TEXT} characters")
    return _Lexer(text.translate(_FULL_WIDTH_FORMS), in_math_mode).tokenize()


class _Lexer:
    """Lexer of one text. The methods that read tokens return the position after the last one."""

    def __init__(self, text: str, math: bool):
        self.text, self.tokens, self.math, self.spaced = text, [], math, False
        self.always_math, self.closes = math, closing_positions(text)
        self.closing = set(self.closes.values())
        self.prose_until: list[int] = []
        self.comma_list_end = 0  # end of the last groups of digits that are a list of numbers

    def tokenize(self) -> list[Token]:
        position = 0
        while position < len(self.text):
            if self.prose_until and position >= self.prose_until[-1]:
                position = self.prose_until.pop() + 1  # past the brace that closes \text{...}
                self.spaced = True
                continue
            position = self._read_token(position)
        return _read_x_as_times(self.tokens)

    def _add_token(self, kind: str, text: str, start: int, end: int, **more) -> int:
        """Append a token and return ``end``."""
        prose = bool(self.prose_until)
        math = self.math and not prose
        token = Token(kind, text, start, end, self.spaced, math, prose, **more)
        self.tokens.append(token)
        self.spaced = False
        return end

    def _read_token(self, start: int) -> int:
        """Read the token that begins at ``start``, and return its end."""
        letter, following = self.text[start], self.text[start + 1 : start + 2]
        if space := _SPACE.match(self.text, start):
            self.spaced = True
            return space.end()
        if letter == "\n":
            self._add_token("line", "\n", start, start + 1)
            self.spaced = True
            return start + 1
        if letter == "\\":
            if spacing := _SPACING.match(self.text, start):
                self.spaced = True
                return spacing.end()
            return self._command(start)
        if letter == "$":
            return self._dollar(start)
        is_decimal = letter == "." and (
            following.isdecimal() or _REPEATING_DECIMAL.match(self.text, start)
        )
        if letter.isdecimal() or is_decimal:
            return self._number(start)
        if letter in _SYMBOL_COMMANDS:
            return self._add_token("command", _SYMBOL_COMMANDS[letter], start, start + 1)
        if superscript := _SUPERSCRIPT_NUMBER.match(self.text, start):
            return self._superscript(superscript)
        if unicodedata.category(letter) == "No":
            return self._fraction_character(start)
        if (
            dollars := _DOLLAR_PREFIX.match(self.text, start)
        ) and dollars.end() - 1 not in self.closes:
            country = dollars[1].removeprefix("US")
            return self._add_token("currency", f"{country}$", start, dollars.end())
        if word := _WORD.match(self.text, start):
            return self._add_token("word", word.group(), start, word.end())
        return self._symbol(start)

    def _symbol(self, start: int) -> int:
        """Read an operator, a currency sign, punctuation or an unknown character."""
        letter, double = self.text[start], self.text[start : start + 2]
        if self.text.startswith("...", start) or letter == "…":
            return self._add_token("punctuation", "...", start, start + (1 if letter == "…" else 3))
        if double in _DOUBLE_OPERATORS:
            return self._add_token("operator", _DOUBLE_OPERATORS[double], start, start + 2)
        if letter == "~":
            return self._tilde(start)
        if letter in _OPERATOR_CHARACTERS or letter in "+-*/^_=<>()[]{}|,;:!%&":
            return self._add_token(
                "operator", _OPERATOR_CHARACTERS.get(letter, letter), start, start + 1
            )
        if letter == "¢":
            return self._add_token("currency", "cent", start, start + 1)
        kinds = {"currency": "€£¥₹", "punctuation": ".?\"'“”’‘—`#"}
        kind = next((kind for kind, letters in kinds.items() if letter in letters), "unknown")
        return self._add_token(kind, letter, start, start + 1)

    def _tilde(self, start: int) -> int:
        """Read ``~``, which is white space (LaTeX) or means "about".

        It is white space if characters other than white space are on both sides.
        """
        around = self.text[max(0, start - 1) : start], self.text[start + 1 : start + 2]
        if all(c and not c.isspace() for c in around):
            self.spaced = True
            return start + 1
        return self._add_token("operator", "~", start, start + 1)

    def _command(self, start: int) -> int:
        """Read a LaTeX command."""
        match = _COMMAND.match(self.text, start)
        if match is None:
            return self._add_token("unknown", "\\", start, start + 1)
        end, name = match.end(), match.group(1)
        if name is None:
            return self._escaped_character(match.group(2), start, end)
        name = _COMMAND_ALIASES.get(name, name)
        if name in _IGNORED_COMMANDS:
            self.spaced = True
            return end
        if name in _TEXT_COMMANDS:
            return self._begin_text_command(start, end)
        if name in "{}":
            return self._add_token("operator", f"\\{name}", start, end)
        if name in _OPERATOR_COMMANDS:
            return self._add_token("operator", _OPERATOR_COMMANDS[name], start, end)
        return self._add_token("command", name, start, end)

    def _escaped_character(self, character: str, start: int, end: int) -> int:
        """Read a backslash before a character that is not a letter."""
        if character in "()[]":
            self.math = self.always_math or character in "(["
            return self._add_token("delimiter", character, start, end)
        if character in ",;:! \n":
            self.spaced = True
            return end
        kind, text = _ESCAPED_CHARACTERS.get(character, ("unknown", character))
        return self._add_token(kind, text, start, end)

    def _begin_text_command(self, start: int, end: int) -> int:
        """Read ``\\text{``; the tokens up to its closing brace are prose."""
        if self.text[end : end + 1] != "{" or end not in self.closes:
            return self._add_token("unknown", "\\text", start, end)
        self.prose_until.append(self.closes[end])
        self.spaced = True
        return end + 1

    def _dollar(self, start: int) -> int:
        """Read a dollar sign.

        ``$$`` is a math delimiter. A single dollar sign is one if it has a matching sign (see
        ``closing_positions``), and a currency sign otherwise.
        """
        text = self.text
        if text.startswith("$$", start):
            self.math = self.always_math or not self.math
            return self._add_token("delimiter", "$$", start, start + 2)
        if self.math and not self.always_math:
            self.math = False
            return self._add_token("delimiter", "$", start, start + 1)
        if start in self.closes:
            self.math = True
            return self._add_token("delimiter", "$", start, start + 1)
        if self.always_math and start in self.closing:
            return self._add_token("delimiter", "$", start, start + 1)
        return self._add_token("currency", "$", start, start + 1)

    def _superscript(self, match: re.Match[str]) -> int:
        """Read superscript digits as ``^{...}``."""
        digits = match.group().translate(_SUPERSCRIPT_DIGITS)
        start, end = match.span()
        if len(digits) > MAX_DIGITS:
            return self._add_token("unknown", "number too large", start, end)
        self._add_token("operator", "^", start, end)
        self._add_token("operator", "{", start, end)
        if digits[0] in "+-":
            self._add_token("operator", digits[0], start, end)
            digits = digits[1:]
        self._add_token("number", digits, start, end, value=Fraction(int(digits)))
        return self._add_token("operator", "}", start, end)

    def _fraction_character(self, start: int) -> int:
        """Read a character such as ½."""
        parts = unicodedata.normalize("NFKC", self.text[start]).split("⁄")
        if len(parts) == 2 and all(part.isdecimal() for part in parts):
            value = Fraction(int(parts[0]), int(parts[1]))
            return self._add_token("number", "vulgar", start, start + 1, value=value)
        return self._add_token("unknown", self.text[start], start, start + 1)

    def _number(self, start: int) -> int:
        """Read a number, which may have thousands separators and an exponent.

        A number that exceeds `MAX_DIGITS` or `MAX_EXPONENT` becomes a token of kind ``unknown``.
        """
        text, groups = self.text, ()
        if match := _REPEATING_DECIMAL.match(text, start):
            return self._repeating_decimal(match)
        digits, end = "", start
        # No number begins with a zero before a separator: 0,500 is 0.5 or two numbers.
        grouped = unicodedata.decimal(text[start], 0) != 0
        match = _EUROPEAN_NUMBER.match(text, start) if grouped else None
        if match:
            digits, end = re.sub(r"[. ]", "", match.group()).replace(",", "."), match.end()
        elif (
            grouped
            and start >= self.comma_list_end
            and (match := _GROUPED_NUMBER.match(text, start))
        ):
            end = match.end()
            if match.group("mark") == "," and self._comma_and_digits_follow(end):
                self.comma_list_end = end
                match, end = None, start
            else:
                digits = match.group().replace(match.group("mark"), "")
                if match.group("mark") == ",":
                    groups = tuple(match.group().split(","))
                if more := _FRACTION_PART.match(text, end):
                    digits, end, groups = digits + more.group(), more.end(), ()
        if match is None:
            match = _PLAIN_NUMBER.match(text, start)
            assert match is not None
            digits, end = match.group(), match.end()
        exponent = _EXPONENT.match(text, end)
        power = 0
        if exponent:
            sign = "-" if exponent.group(1) in ("-", "−") else ""
            power, end = int(sign + (exponent.group(2)[:6] or "0")), exponent.end()
        if len(digits) > MAX_DIGITS or abs(power) > MAX_EXPONENT:
            return self._add_token("unknown", "number too large", start, end)
        value = Fraction(_ascii_digits(digits)) * Fraction(10) ** power
        return self._add_token("number", text[start:end], start, end, value=value, groups=groups)

    def _repeating_decimal(self, match: re.Match[str]) -> int:
        """Read a repeating decimal such as ``0.1\\overline{6}``."""
        whole, first, period = (_ascii_digits(part) for part in match.groups())
        start, end = match.span()
        if end - start > MAX_DIGITS:
            return self._add_token("unknown", "number too large", start, end)
        cycle = Fraction(int(period), 10 ** len(period) - 1)
        value = int(whole or "0") + (int(first or "0") + cycle) / 10 ** len(first)
        return self._add_token("number", match.group(), start, end, value=value)

    def _comma_and_digits_follow(self, end: int) -> bool:
        """Return whether a comma and more digits follow, so that the number is part of a list."""
        return self.text[end : end + 1] == "," and self.text[end + 1 : end + 2].isdecimal()


def _ascii_digits(digits: str) -> str:
    """Convert Unicode decimal digits to ASCII digits; periods are kept."""
    return "".join(c if c == "." else str(unicodedata.decimal(c)) for c in digits)


def closing_positions(text: str) -> dict[int, int]:
    """Return opening position -> closing position of each pair of braces or dollar signs.

    Escaped braces, escaped dollar signs and ``$$`` are skipped.
    """
    pairs: dict[int, int] = {}
    open_braces: list[int] = []
    dollar, position = None, 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 2
            continue
        if letter == "{":
            open_braces.append(position)
        elif letter == "}" and open_braces:
            pairs[open_braces.pop()] = position
        elif letter == "$":
            if text.startswith("$$", position):
                position += 2
                continue
            if dollar is not None and _encloses_math(text, dollar, position):
                pairs[dollar], dollar = position, None
            else:
                dollar = position
        position += 1
    return pairs


def _encloses_math(text: str, start: int, end: int) -> bool:
    """Return whether two dollar signs are math delimiters and not currency signs."""
    inside = text[start + 1 : end]
    if not inside.strip() or "\n\n" in inside or text[end + 1 : end + 2].isdigit():
        return False
    return inside[0].isspace() == inside[-1].isspace()


def _read_x_as_times(tokens: list[Token]) -> list[Token]:
    """Replace each letter x between two numbers by a multiplication sign.

    The letter must have white space on both sides or on neither side.
    """
    changed = list(tokens)
    for i in range(1, len(tokens) - 1):
        before, here, after = tokens[i - 1 : i + 2]
        if (
            here.kind == "word"
            and here.text in "xX"
            and before.kind == after.kind == "number"
            and here.spaced == after.spaced
        ):
            changed[i] = replace(here, kind="operator", text="*")
    return changed
