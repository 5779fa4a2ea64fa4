"""Parse one number with its unit; a text that does not fit this grammar is rejected.

quantity  = [name "="] value            the value after the last "=" of a chain of equations
value     = [sign] [currency] [sign] magnitude {scale word} [currency | unit]
magnitude = "(" value without unit ")" | mixed | fraction | power | number
            | product with a power of ten
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from operator import add, mul, neg, truediv

from rlhf.reward_models.notation import units
from rlhf.reward_models.notation.grammar import Node, parse_answer
from rlhf.reward_models.notation.lexer import MAX_EXPONENT, NotUnderstood, Token, tokens_of
from rlhf.reward_models.notation.marks import marked_answer
from rlhf.reward_models.notation.prose import answer_segment, final_statement
from rlhf.reward_models.notation.reader import TokenReader, mixed_number

_CLOSING_QUOTES = ('"', "'", "”", "’")
_MAX_BITS = 20_000
_CALCULATIONS = {"negative": neg, "add": add, "multiply": mul, "divide": truediv}
_RELATIONS = ("<", ">", "<=", ">=", "!=", "in", "=>", "->", "equiv", "cup", "cap", "+-", "-+")
_NEGATIONS = ("not", "neg", "lnot", "nexists", "nsim", "ncong")
"""LaTeX commands that negate a relation, as in ``x \\not= 5``."""
_CURRENCY_NAMES = {"$": "dollars", "€": "euros", "£": "gbp"}
_SIGNS = {"-": -1, "minus": -1, "negative": -1, "+": 1, "plus": 1, "positive": 1}


@dataclass(frozen=True)
class Quantity:
    """An exact number and its unit."""

    value: Fraction
    """The number; a percentage is divided by 100."""
    unit: str = ""
    """The unit in its canonical spelling; empty if there is none."""

    def matches(self, other: Quantity, *, tolerance: Fraction = Fraction(0)) -> bool:
        """Return whether the values differ by at most ``tolerance`` and the units are equal.

        A missing unit equals every unit.
        """
        near = abs(self.value - other.value) <= tolerance
        return near and units.agree_or_missing(self.unit, other.unit)


def parse_quantity(
    text: str, *, is_reference: bool = False, equations_complete: bool = True
) -> Quantity:
    """Parse a text that consists of one number.

    Args:
        text: A number without surrounding sentences.
        is_reference: Whether the text is a reference answer. A reference must not be approximate.
            It must not have a decimal comma, because the comma could also separate two numbers.
        equations_complete: Whether no number before the text can belong to the left side of an
            equation in the text. Only complete equations are checked.

    Raises:
        NotUnderstood: A part of the text cannot be parsed, or an equation is not true.
    """
    tokens = _strip_quotes_and_breaks([t for t in tokens_of(text) if t.kind != "delimiter"])
    if any(token.kind == "line" for token in tokens):
        raise NotUnderstood("several lines")
    if is_reference and any(token.is_op("~") for token in tokens):
        raise NotUnderstood("an approximate value")
    for token in tokens:
        if token.kind == "unknown":
            is_number = token.text.startswith("number")
            raise NotUnderstood(token.text if is_number else f"the unknown symbol {token.text!r}")
    if not any(token.kind == "number" for token in tokens):
        raise NotUnderstood("no number")
    last = _tokens_after_last_equals(tokens)
    reader = _QuantityReader(last, decimal_comma=not is_reference)
    quantity = reader.read_quantity()
    if reader.peek().kind != "end":
        raise NotUnderstood("more than one number, or words around it")
    if equations_complete:
        equations = tokens[: len(tokens) - len(last)]
        _check_calculations(text, equations, quantity, text[last[0].start :])
    return quantity


@lru_cache(maxsize=4096)
def parse_reference_quantity(reference: str) -> Quantity:
    """Parse the number in a reference answer: in its box, after ``####``, or in the whole text.

    Raises:
        NotUnderstood: The answer does not consist of one number.
    """
    answer = marked_answer(reference).text
    return parse_quantity(units.with_powers_before_units(answer), is_reference=True)


def parse_final_quantity(reply: str) -> Quantity:
    """Parse the final number of a reply, with its unit.

    Raises:
        NotUnderstood: There is no number, or it is ambiguous.
    """
    segment = answer_segment(reply)
    try:
        return parse_quantity(segment.text)
    except NotUnderstood:
        is_factorial = segment.is_boxed and "!" in segment.text  # elsewhere, it ends a sentence
        if is_factorial or segment.is_formula:
            raise
        statement = final_statement(segment.text, numbers_only=True)
    text = f"{statement.text} {leading_unit_words(statement.words)}"
    return parse_quantity(text, equations_complete=statement.equations_complete)


def leading_unit_words(text: str) -> str:
    """Return the scale words and known units with which a text begins, joined by spaces.

    They are at most four words; the first unknown word or letter ends them.
    """
    selected: list[str] = []
    text = re.sub(r"\\(?:text|mbox|mathrm)\b", "", text.split(",")[0])
    for word in re.findall(r"[^\W\d_]+|%|°", text)[:4]:
        known = units.known_unit(word) or word in ("%", "°")
        scaled = word.lower() in (*units.SCALES, "square", "cubic", "sq", "per", "cent")
        is_scale = bool(selected) and units.canonical_unit([selected[-1], word]) in (
            "degC",
            "degF",
        )
        is_letter = len(word) == 1 and word.isalpha() and not is_scale
        if not (known or scaled or is_scale) or is_letter:
            break
        if word.lower() == "per" and not (selected or text.lower().lstrip().startswith("per cent")):
            break
        selected.append(word)
    while selected and selected[-1].lower() in ("square", "cubic", "sq", "per"):
        selected.pop()
    return " ".join(selected)


def _strip_quotes_and_breaks(tokens: list[Token]) -> list[Token]:
    """Return the tokens without line breaks and quotation marks at both ends and final periods."""
    start, end = 0, len(tokens)
    while start < end and (tokens[start].kind == "line" or tokens[start].text in "\"'“‘"):
        start += 1
    is_quoted = any(token.kind == "punctuation" for token in tokens[:start])
    ends = ("\n", ".", *(_CLOSING_QUOTES if is_quoted else ()))
    while end > start and tokens[end - 1].text in ends:
        end -= 1
    return tokens[start:end]


def _tokens_after_last_equals(tokens: Sequence[Token]) -> list[Token]:
    """Return the tokens after the last "=" or "~"; all tokens if there is none.

    Raises:
        NotUnderstood: The tokens contain a relation other than "=" or "~", a negation, or several
            statements.
    """
    if any(token.is_op(*_RELATIONS) or token.is_command(*_NEGATIONS) for token in tokens):
        raise NotUnderstood("a relation, not a number")
    positions = [i for i, token in enumerate(tokens) if token.is_op("=", "~")]
    if not positions:
        return list(tokens)
    for token in tokens[: positions[-1]]:
        is_joint = token.kind == "word" and token.text.lower() in units.NOT_UNITS - {"a"}
        if is_joint or token.is_op(",", ";") or token.kind == "punctuation":
            raise NotUnderstood("more than one statement")
    return list(tokens[positions[-1] + 1 :])


def _check_calculations(
    text: str, tokens: Sequence[Token], quantity: Quantity, value_text: str
) -> None:
    """Check that each calculation before a "=" has the final value, up to rounding.

    Nothing is checked if the final value has a scale word.

    Args:
        text: The whole text.
        tokens: The tokens up to the last "=".
        quantity: The value after the last "=".
        value_text: Text of this value. Its decimals determine the allowed rounding error.

    Raises:
        NotUnderstood: A calculation has a different value, as in ``43 = 42``.
    """
    decimals = re.search(r"\.(\d+)", value_text)
    step = Fraction(
        1, 10 ** (len(decimals[1]) if decimals else 0) * (100 if "%" in value_text else 1)
    )
    start = 0
    for i, token in enumerate(tokens):
        if not token.is_op("=", "~"):
            continue
        if (
            i > start
            and token.is_op("=")
            and not any(w in value_text.lower() for w in units.SCALES)
        ):
            value = _calculation_value(text[tokens[start].start : token.start])
            is_rounded = value is not None and (value / step).denominator > 1
            if value is not None and abs(value - quantity.value) >= (step if is_rounded else 1e-30):
                raise NotUnderstood("an equation that is not true")
        start = i + 1


def _calculation_value(text: str) -> Fraction | None:
    """Return the value of a calculation with numbers, or None for any other text."""
    try:
        return _evaluate_tree(parse_answer(text, in_math_mode=False))
    except (NotUnderstood, ZeroDivisionError):
        return None


def _evaluate_tree(node: Node) -> Fraction | None:
    """Return the value of a tree of numbers and basic operations, or None for any other tree."""
    if node.kind == "number":
        assert isinstance(node.data, Fraction)
        return node.data
    values = [_evaluate_tree(child) for child in node.args]
    is_money = node.kind == "unit" and node.data in ("$", "€", "£")
    if any(value is None for value in values) or not (is_money or node.kind in _CALCULATIONS):
        return None
    return values[0] if is_money else _CALCULATIONS[node.kind](*values)


class _QuantityReader(TokenReader):
    """Recursive-descent parser of one quantity.

    The methods that return a number parse what their name states, and move past it. They raise
    NotUnderstood if the next tokens do not fit, or a number is too large.
    """

    def __init__(self, tokens: Sequence[Token], *, decimal_comma: bool):
        super().__init__(tokens)
        self.decimal_comma = decimal_comma

    def read_quantity(self) -> Quantity:
        with self.limit_depth():
            sign, currency = self._sign(), self.take_currency()
            if sign < 0 and self.peek().text.lower() in _SIGNS:
                raise NotUnderstood("two signs")
            number = sign * self._sign() * self._magnitude()
            if currency in _CURRENCY_NAMES and (
                self.peek().is_op("/") or self.peek().text.lower() == "per"
            ):  # a price, as in $5/hour
                name = Token("word", _CURRENCY_NAMES[currency], -1, -1, spaced=True)
                self.tokens.insert(self.position, name)
                currency = ""
            number, unit = number * self._scale(), self._unit()
        if currency and unit and currency != unit:
            raise NotUnderstood("two units")
        return (
            Quantity(number / 100) if unit == units.PERCENT else Quantity(number, unit or currency)
        )

    def _sign(self) -> int:
        """Parse a sign, which may be a word; return -1 or 1. Without a sign, the result is 1."""
        sign = _SIGNS.get(self.peek().text.lower())
        self.position += sign is not None
        return sign or 1

    def _magnitude(self) -> Fraction:
        if opening := self.take_op("(", "{"):
            return self._with_optional_exponent(
                self._bracketed_number(")" if opening == "(" else "}")
            )
        return (
            self._fraction() if self.peek().is_command("frac") else self._number_fraction_or_power()
        )

    def _bracketed_number(self, closing: str) -> Fraction:
        """Parse a number without a unit, or a fraction with ``\\over``, up to a closing bracket."""
        quantity, bottom = self.read_quantity(), Quantity(Fraction(1))
        if closing == "}" and self.peek().is_command("over"):
            self.take()
            bottom = self.read_quantity()
        self.expect(closing)
        if quantity.unit or bottom.unit:
            raise NotUnderstood("a unit inside brackets")
        if not bottom.value:
            raise NotUnderstood("division by zero")
        return quantity.value / bottom.value

    def _fraction(self) -> Fraction:
        self.take()
        top, bottom = self._argument(), self._argument()
        if bottom == 0:
            raise NotUnderstood("division by zero")
        return top / bottom

    def _argument(self) -> Fraction:
        """Parse an argument of ``\\frac``: a number in braces, or a single digit without braces."""
        if self.take_op("{"):
            return self._bracketed_number("}")
        token = self.peek()
        if token.kind != "number" or not token.text.isdigit():
            raise NotUnderstood("a fraction without two numbers")
        return Fraction(int(self.take_first_character()))

    def _number(self) -> Fraction:
        token = self.peek()
        if token.kind != "number":
            raise NotUnderstood("no number where a number is expected")
        if self.peek(-1).kind == "word" and not token.spaced:
            raise NotUnderstood("a number that is part of a name")
        return self.take().value

    def _number_fraction_or_power(self) -> Fraction:
        token, number = self.peek(), self._number()
        if token.text == "vulgar":
            return number
        number = self._add_digits_after_decimal_comma(token, number)
        if number.denominator == 1:
            if self.peek().is_command("frac") and not self.is_unit_fraction(in_text=False):
                return mixed_number(number, self._fraction(), Fraction(1))
            if (mixed := self.take_mixed_fraction(number)) is not None:
                return mixed
        number = self._with_optional_exponent(number)
        after = self.peek(1)
        is_price = after.kind == "word" and after.text.lower() not in _SIGNS  # as in $5/hour
        if not is_price and self.take_op("/"):
            bottom = self._sign() * self._with_optional_exponent(self._number())
            if bottom == 0 or self.peek().is_op("/", ":"):
                raise NotUnderstood("division by zero, or more than one division")
            return number / bottom
        return self._times_power_of_ten(number)

    def _add_digits_after_decimal_comma(self, token: Token, number: Fraction) -> Fraction:
        """Add the digits after a decimal comma, if there is a comma directly after ``token``.

        Raises:
            NotUnderstood: The comma may separate two numbers.
        """
        comma, after = self.peek(), self.peek(1)
        if not comma.is_op(",") or comma.spaced or after.spaced:
            return number
        digits = after.text
        is_decimal = self.decimal_comma and token.text.isdigit() and digits.isdigit()
        if not is_decimal or len(digits) == 3 or self.peek(2).is_op(","):
            raise NotUnderstood("more than one number")
        self.position += 2
        return number + Fraction(int(digits), 10 ** len(digits))

    def _with_optional_exponent(self, base: Fraction) -> Fraction:
        """Parse an exponent after ``base`` and return the power; without an exponent, ``base``."""
        if self.is_degree() or not self.take_op("^"):
            return base
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        return self._power(base, max_exponent=_MAX_BITS // size)

    def _power(self, base: Fraction, *, max_exponent: int) -> Fraction:
        """Parse the exponent after ``^`` and return the power of ``base``."""
        exponent = self._exponent()
        if self.peek().is_op("^"):
            raise NotUnderstood("a power of a power")
        if abs(exponent) > max_exponent:
            raise NotUnderstood("number too large")
        if base == 0 and exponent < 0:
            raise NotUnderstood("division by zero")
        return base**exponent

    def _exponent(self) -> int:
        opening = self.take_op("{", "(")
        exponent = self._sign() * self._number()
        if opening:
            self.expect("}" if opening == "{" else ")")
        if exponent.denominator != 1:
            raise NotUnderstood("an exponent that is not a whole number")
        return int(exponent)

    def _times_power_of_ten(self, mantissa: Fraction) -> Fraction:
        """Parse a power of ten as in ``1.5 * 10^3`` and return the product with ``mantissa``.

        If no power of ten follows, the result is ``mantissa``.
        """
        times, ten, power = self.peek(), self.peek(1), self.peek(2)
        if not (times.is_op("*") and ten.value == 10 and power.is_op("^")):
            return mantissa
        self.position += 3
        return mantissa * self._power(Fraction(10), max_exponent=MAX_EXPONENT)

    def _scale(self) -> int:
        """Parse scale words such as "million" and return their product; 1 if there are none."""
        scale = 1
        while factor := units.SCALES.get(self.peek().text.lower()):
            scale *= factor
            self.position += 1
            if scale > 10**15:
                raise NotUnderstood("number too large")
        return scale

    def _unit(self) -> str:
        """Parse a currency, a percent or degree sign, or a unit; return "" if there is none.

        Words that are not known units are taken up to a total of six words.
        """
        if self.take_op("%"):
            return units.PERCENT
        if self.take_degree():
            return self._temperature_scale() or "deg"
        if currency := self.take_currency():
            return currency
        start, words = self.position, self.take_known_units()
        while len(words) < 6 and (word := self._unit_word(words)) is not None:
            words.append(word)
        if words and units.cannot_end_unit(words[-1]):
            raise NotUnderstood("a unit that is cut off")
        unit = units.canonical_unit(words)
        if unit == "deg":
            return self._temperature_scale() or unit
        if unit.startswith("/"):  # "5 per day" has no unit before the slash
            self.position = start
            return ""
        return unit

    def _temperature_scale(self) -> str | None:
        """Take a temperature scale after a degree sign, such as C; None if there is none."""
        token = self.peek()
        scale = units.temperature_scale(token.text) if token.kind == "word" else None
        self.position += scale is not None
        return scale

    def _unit_word(self, words: list[str]) -> str | None:
        """Parse the next word, slash or power of a unit that begins with ``words``.

        The result is None if there is none.
        """
        token = self.peek()
        if token.kind == "word" and token.text.lower() not in units.NOT_UNITS:
            if token.text == "K" and not token.spaced and not words:
                return None  # K can mean kelvin or thousand
            if units.known_unit(token.text) is None:
                is_ordinal = not token.spaced and not words
                if len(token.text) == 1 or is_ordinal:
                    return None  # a variable, as in 5x, or an ordinal
            return self.take().text
        if not words:
            return None
        if token.kind == "punctuation" and token.text == "." and self.peek(1).kind != "end":
            self.take()
            return self._unit_word(words)
        if self.peek().is_op("^"):
            return self.take_unit_exponent() or None
        following = self.peek(1)
        is_word = following.kind == "word" and following.text.lower() not in units.NOT_UNITS
        is_long = is_word and (len(following.text) > 1 or units.known_unit(following.text))
        return self.take_op("/") if is_long else None
