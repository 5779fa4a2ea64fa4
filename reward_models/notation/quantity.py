"""Parse one number with its unit; text that does not fit the grammar is rejected.

quantity  = [name "="] value            after the last "=" of a chain of equations
value     = signs [currency] magnitude [currency] [scale word] [unit]
magnitude = "(" value ")" | mixed | fraction | power | product with a power of ten | number
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rlhf.reward_models.notation import units
from rlhf.reward_models.notation.lexer import MAX_EXPONENT, NotUnderstood, Token, tokens_of
from rlhf.reward_models.notation.marks import answer_segment
from rlhf.reward_models.notation.prose import final_statement, reply_segment

_CLOSING_MARKS = ("\n", ".", '"', "'", "”", "’")
_MAX_BITS = 20_000
_MAX_DEPTH = 30
_RELATIONS = ("<", ">", "<=", ">=", "!=", "in", "=>", "->", "equiv", "cup", "cap", "+-", "-+")
_SIGN_WORDS = {"minus": -1, "negative": -1, "plus": 1, "positive": 1}


@dataclass(frozen=True)
class Quantity:
    """An exact number and its unit."""

    value: Fraction
    """The number; a percentage is divided by 100."""
    unit: str = ""
    """The unit in the spelling of ``units``; empty if there is none."""

    def matches(self, other: Quantity, *, tolerance: Fraction = Fraction(0)) -> bool:
        """Whether ``other``, from a reply, has this value and no different unit."""
        near = abs(self.value - other.value) <= tolerance
        return near and units.agree(self.unit, other.unit)


def read_quantity(text: str, *, is_reference: bool = False) -> Quantity:
    """Parse a text that consists of one number.

    Args:
        text: A number without surrounding sentences.
        is_reference: Whether to reject a decimal comma, which may also separate two numbers.

    Raises:
        NotUnderstood: A part of the text cannot be parsed.
    """
    tokens = _without_ends([t for t in tokens_of(text) if t.kind != "delimiter"])
    if any(token.kind == "line" for token in tokens):
        raise NotUnderstood("several lines")
    if is_reference and any(token.is_op("~") for token in tokens):
        raise NotUnderstood("a value that is only near")
    if any(token.kind == "unknown" for token in tokens):
        bad = next(token.text for token in tokens if token.kind == "unknown")
        raise NotUnderstood(bad if bad.startswith("number") else "a symbol that is not known")
    if not any(token.kind == "number" for token in tokens):
        raise NotUnderstood("no number")
    reader = _Reader(_after_equals(tokens), decimal_comma=not is_reference)
    quantity = reader.value()
    if reader.place < len(reader.tokens):
        raise NotUnderstood("more than one number, or words around it")
    return quantity


@lru_cache(maxsize=4096)
def read_reference_quantity(reference: str) -> Quantity:
    """Parse a reference answer: the whole text, its box or the text after ``####``.

    Raises:
        NotUnderstood: It is not one number.
    """
    return read_quantity(answer_segment(reference)[0], is_reference=True)


def read_final_quantity(reply: str) -> Quantity:
    """Parse the final number of a reply, with its unit.

    Raises:
        NotUnderstood: There is no number, or it is ambiguous.
    """
    segment, _ = reply_segment(reply)
    try:
        return read_quantity(segment)
    except NotUnderstood:
        statement = final_statement(segment, numbers_only=True)
    return read_quantity(f"{statement.text} {unit_words(statement.words)}")


def unit_words(words: str) -> str:
    """The scale words and known units at the start of ``words``."""
    kept: list[str] = []
    for word in re.findall(r"[^\W\d_]+|%|°", words.split(",")[0])[:4]:
        known = units.known_unit(word) or word in ("%", "°")
        scaled = word.lower() in (*units.SCALES, "square", "cubic", "sq", "per", "cent")
        if not (known or scaled) or (len(word) == 1 and word.isalpha()):
            break
        if word.lower() == "per" and not (kept or words.lower().lstrip().startswith("per cent")):
            break
        kept.append(word)
    while kept and kept[-1].lower() in ("square", "cubic", "sq", "per"):
        kept.pop()
    return " ".join(kept)


def _without_ends(tokens: list[Token]) -> list[Token]:
    """The tokens without surrounding line breaks, quotation marks and the full stop."""
    start, end = 0, len(tokens)
    while end > start and (
        tokens[end - 1].kind == "line" or tokens[end - 1].text in _CLOSING_MARKS
    ):
        end -= 1
    while start < end and (tokens[start].kind == "line" or tokens[start].text in "\"'“‘"):
        start += 1
    return tokens[start:end]


def _after_equals(tokens: Sequence[Token]) -> list[Token]:
    if any(token.is_op(*_RELATIONS) for token in tokens):
        raise NotUnderstood("a relation, not a number")
    places = [i for i, token in enumerate(tokens) if token.is_op("=", "~")]
    if not places:
        return list(tokens)
    for token in tokens[: places[-1]]:
        is_joint = token.kind == "word" and token.text.lower() in units.NOT_UNITS - {"a"}
        if is_joint or token.is_op(",", ";") or token.kind == "punctuation":
            raise NotUnderstood("more than one statement")
    return list(tokens[places[-1] + 1 :])


class _Reader:
    """Recursive-descent parser; ``place`` is the index of the next token."""

    def __init__(self, tokens: list[Token], *, decimal_comma: bool):
        self.tokens, self.place, self.depth = tokens, 0, 0
        self.decimal_comma = decimal_comma

    def peek(self, ahead: int = 0) -> Token | None:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def take_op(self, *texts: str) -> str | None:
        token = self.peek()
        if token is None or not token.is_op(*texts):
            return None
        self.place += 1
        return token.text

    def expect(self, text: str) -> None:
        if self.take_op(text) is None:
            raise NotUnderstood(f"no {text} where one is due")

    def value(self) -> Quantity:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise NotUnderstood("brackets too deep")
        sign, currency = self._sign(), self._currency()
        sign *= self._sign(once=sign < 0)
        number = self._magnitude()
        scale, unit = self._suffix(currency or "")
        self.depth -= 1
        value, unit = units.in_percent(sign * number * scale, unit)
        return Quantity(value, unit)

    def _sign(self, once: bool = False) -> int:
        token = self.peek()
        if token is None:
            return 1
        if token.kind == "word" and token.text.lower() in _SIGN_WORDS:
            sign = _SIGN_WORDS[token.text.lower()]
        elif token.is_op("+", "-"):
            sign = -1 if token.text == "-" else 1
        else:
            return 1
        if once:
            raise NotUnderstood("two signs")
        self.place += 1
        return sign

    def _currency(self) -> str | None:
        token = self.peek()
        if token is None or token.kind != "currency":
            return None
        self.place += 1
        return token.text

    def _magnitude(self) -> Fraction:
        opening = self.take_op("(", "{")
        if opening:
            inner = self.value()
            self.expect(")" if opening == "(" else "}")
            if inner.unit:
                raise NotUnderstood("a unit inside brackets")
            return self._powers(inner.value)
        token = self.peek()
        if token is not None and token.is_command("frac"):
            self.place += 1
            return self._frac()
        return self._written()

    def _frac(self) -> Fraction:
        top, bottom = self._argument(), self._argument()
        if bottom == 0:
            raise NotUnderstood("division by zero")
        return top / bottom

    def _argument(self) -> Fraction:
        """Parse an argument of ``\\frac``: braces, or a single digit of a number without braces."""
        if self.take_op("{"):
            inner = self.value()
            self.expect("}")
            if inner.unit:
                raise NotUnderstood("a unit inside a fraction")
            return inner.value
        token = self.peek()
        if token is None or token.kind != "number" or not token.text.isdigit():
            raise NotUnderstood("a fraction without two numbers")
        digits = token.text
        if len(digits) == 1:
            self.place += 1
        else:
            rest = Token("number", digits[1:], token.start + 1, token.end,
                         value=Fraction(int(digits[1:])))  # fmt: skip
            self.tokens[self.place] = rest
        return Fraction(int(digits[0]))

    def _number(self) -> tuple[Token, Fraction]:
        token = self.peek()
        if token is None or token.kind != "number" or token.value is None:
            raise NotUnderstood("no number where one is due")
        before = self.peek(-1) if self.place else None
        if before is not None and before.kind == "word" and not token.spaced:
            raise NotUnderstood("a number that is part of a name")
        self.place += 1
        return token, token.value

    def _written(self) -> Fraction:
        token, number = self._number()
        if token.text == "vulgar":
            return number
        number, token = self._decimal_comma(token, number)
        if number.denominator == 1:
            mixed = self._mixed(int(number))
            if mixed is not None:
                return mixed
        number = self._powers(number)
        if self.take_op("/"):
            sign = self._sign()
            bottom = self._powers(self._number()[1]) * sign
            if bottom == 0 or (self.peek() and self.peek().is_op("/", ":")):  # type: ignore[union-attr]
                raise NotUnderstood("division by zero, or more than one division")
            return number / bottom
        return self._scientific(number)

    def _decimal_comma(self, token: Token, number: Fraction) -> tuple[Fraction, Token]:
        comma, after = self.peek(), self.peek(1)
        if comma is None or after is None or not comma.is_op(",") or comma.spaced or after.spaced:
            return number, token
        digits = after.text
        if not self.decimal_comma or not token.text.isdigit() or not digits.isdigit():
            raise NotUnderstood("more than one number")
        last = self.peek(2)
        if len(digits) == 3 or (last is not None and last.is_op(",")):
            raise NotUnderstood("more than one number")
        self.place += 2
        return number + Fraction(int(digits), 10 ** len(digits)), after

    def _mixed(self, whole: int) -> Fraction | None:
        """Parse the fraction after an integer, as in ``5 1/2``, ``5½`` or ``5\\frac{1}{2}``."""
        token = self.peek()
        if token is None:
            return None
        if token.kind == "number" and token.text == "vulgar":
            self.place += 1
            return whole + (token.value or Fraction(0))
        if token.is_command("frac"):
            self.place += 1
            part = self._frac()
        elif self._is_fraction_ahead():
            part = self._number()[1]
            self.expect("/")
            part /= self._number()[1]
        else:
            return None
        if not 0 < part < 1:
            raise NotUnderstood("a mixed number whose fraction is not below one")
        return whole + part

    def _is_fraction_ahead(self) -> bool:
        first, slash, second = self.peek(), self.peek(1), self.peek(2)
        if first is None or slash is None or second is None:
            return False
        numbers = first.kind == second.kind == "number" and bool(second.value)
        return numbers and first.spaced and slash.is_op("/")

    def _powers(self, base: Fraction) -> Fraction:
        token, after = self.peek(), self.peek(1)
        if (
            token is None
            or not token.is_op("^")
            or after is None
            or _is_degree(after, self.peek(2))
        ):
            return base
        self.place += 1
        exponent = self._exponent()
        if (token := self.peek()) is not None and token.is_op("^"):
            raise NotUnderstood("a power of a power")
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * size > _MAX_BITS:
            raise NotUnderstood("number too large")
        if base == 0 and exponent < 0:
            raise NotUnderstood("division by zero")
        return base**exponent

    def _exponent(self) -> int:
        opening = self.take_op("{", "(")
        sign = self._sign()
        _, number = self._number()
        if opening:
            self.expect("}" if opening == "{" else ")")
        if number.denominator != 1:
            raise NotUnderstood("a power that is not whole")
        return sign * int(number)

    def _scientific(self, mantissa: Fraction) -> Fraction:
        sign, ten = self.peek(), self.peek(1)
        power = self.peek(2)
        if sign is None or ten is None or power is None or not power.is_op("^"):
            return mantissa
        if not sign.is_op("*") or ten.kind != "number" or ten.value != 10:
            return mantissa
        self.place += 3
        exponent = self._exponent()
        if abs(exponent) > MAX_EXPONENT:
            raise NotUnderstood("number too large")
        if (token := self.peek()) is not None and token.is_op("^"):
            raise NotUnderstood("a power of a power")
        return mantissa * Fraction(10) ** exponent

    def _suffix(self, unit: str) -> tuple[int, str]:
        """Parse a scale word, then a currency, a percent or degree sign, or a unit."""
        scale, token = 1, self.peek()
        while token is not None and token.kind == "word" and token.text.lower() in units.SCALES:
            scale *= units.SCALES[token.text.lower()]
            self.place += 1
            token = self.peek()
            if scale > 10**15:
                raise NotUnderstood("number too large")
        after = self._unit()
        if unit and after and unit != after:
            raise NotUnderstood("two units")
        return scale, after or unit

    def _unit(self) -> str:
        token = self.peek()
        if token is None:
            return ""
        if token.is_op("%"):
            self.place += 1
            return units.PERCENT
        if token.is_op("deg") or token.is_op("^"):
            return self._degree(token)
        if token.kind == "currency":
            self.place += 1
            return token.text
        words, place = [], self.place
        while (token := self.peek()) is not None and len(words) < 6:
            word = self._unit_word(token, words)
            if word is None:
                break
            words.append(word)
        if [word.lower() for word in words] == ["per", "cent"]:
            return units.PERCENT
        if words and words[0] in ("/", "per"):
            self.place = place
            return ""
        return units.canonical(words)

    def _degree(self, token: Token) -> str:
        if token.is_op("^"):
            self.place += 1
            braced = self.take_op("{")
            token = self.peek() or token
            if not token.is_command("circ") and not token.is_op("deg"):
                raise NotUnderstood("a power that is no number")
            self.place += 1
            if braced:
                self.expect("}")
        else:
            self.place += 1
        following = self.peek()
        if following is not None and following.kind == "word" and following.text in ("C", "F"):
            self.place += 1
            return f"deg{following.text}"
        return "deg"

    def _unit_word(self, token: Token, words: list[str]) -> str | None:
        if token.kind == "word" and token.text.lower() not in units.NOT_UNITS:
            if len(token.text) == 1 and units.known_unit(token.text) is None:
                return None
            if not token.spaced and not words and units.known_unit(token.text) is None:
                return None  # a variable, as in 5x, or an ordinal
            self.place += 1
            return token.text
        if token.kind == "punctuation" and token.text == "." and words and self.peek(1):
            self.place += 1
            return self._unit_word(self.peek() or token, words)
        if token.is_op("/") and words:
            self.place += 1
            return "/"
        if token.is_op("^") and words:
            self.place += 1
            return f"^{self._exponent()}"
        return None


def _is_degree(token: Token, after: Token | None) -> bool:
    if token.is_op("{") and after is not None:
        token = after
    return token.is_command("circ") or token.is_op("deg")
