"""Base class of the recursive-descent parsers of quantities and of mathematics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

from rlhf.reward_models.notation import units
from rlhf.reward_models.notation.lexer import NotUnderstood, Token

_END_TOKEN = Token("end", "the end", -1, -1)
_MAX_DEPTH = 40
_MAX_UNIT_WORDS = 12


class TokenReader:
    """Base class of parsers of a list of tokens; ``position`` is the index of the next token."""

    def __init__(self, tokens: Sequence[Token]):
        self.tokens, self.position, self._depth = list(tokens), 0, 0

    def peek(self, ahead: int = 0) -> Token:
        """Return the token at ``position + ahead``, or a token of kind ``end`` if there is none."""
        position = self.position + ahead
        return self.tokens[position] if 0 <= position < len(self.tokens) else _END_TOKEN

    def take(self) -> Token:
        """Return the next token and move past it."""
        token = self.peek()
        self.position += 1
        return token

    def take_op(self, *texts: str) -> str | None:
        """If the next token is one of these operators, take it and return its text; else None."""
        return self.take().text if self.peek().is_op(*texts) else None

    def take_currency(self) -> str:
        """Take a currency sign and return it, or "" if there is none."""
        return self.take().text if self.peek().kind == "currency" else ""

    def expect(self, *texts: str) -> str:
        """Take one of these operators and return its text.

        Raises:
            NotUnderstood: The next token is not one of these operators.
        """
        operator = self.take_op(*texts)
        if operator is None:
            raise NotUnderstood(f"{self.peek().text!r} where {texts[0]!r} is expected")
        return operator

    def take_first_character(self) -> str:
        """Take the first character of a number or word and return it, as in LaTeX ``\\frac12``.

        The other characters become the next token.
        """
        token = self.peek()
        parts = (token.text[:1], token.text[1:]) if len(token.text) > 1 else (token.text,)
        self.tokens[self.position : self.position + 1] = [
            replace(
                token, text=text, value=Fraction(text) if token.kind == "number" else token.value
            )
            for text in parts
        ]
        return self.take().text

    def is_degree(self) -> bool:
        """Return whether a LaTeX degree sign follows: ``^\\circ`` or ``^{\\circ}``."""
        braced = self.peek(1).is_op("{")
        token = self.peek(2 if braced else 1)
        is_circle = token.is_command("circ") or token.is_op("deg")
        return self.peek().is_op("^") and is_circle and (not braced or self.peek(3).is_op("}"))

    def take_degree(self) -> bool:
        """Take a degree sign; return whether there is one."""
        if self.is_degree():
            self.position += 4 if self.peek(1).is_op("{") else 2
            return True
        return self.take_op("deg") is not None

    def take_mixed_fraction(self, whole: Fraction) -> Fraction | None:
        """Take the fraction after a whole number, as in ``5½`` and ``5 1/2``.

        Returns:
            The value of the mixed number, or None if no fraction follows.

        Raises:
            NotUnderstood: The fraction is not between 0 and 1.
        """
        top, slash, bottom = self.peek(), self.peek(1), self.peek(2)
        if top.kind == "number" and top.text == "vulgar":
            return whole + self.take().value
        if not (top.kind == bottom.kind == "number" and top.spaced and slash.is_op("/")):
            return None
        self.position += 3
        return mixed_number(whole, top.value, bottom.value)

    def is_known_unit(self, ahead: int = 0, *, in_text: bool = False) -> bool:
        """Return whether a known unit follows.

        The word "in" is the inch only before a power or after an operator, as in ``5 in^3`` and
        ``5 lb/in``.

        Args:
            ahead: Number of tokens to skip.
            in_text: Whether only words inside ``\\text{...}`` are units.
        """
        token = self.peek(ahead)
        if token.kind != "word" or (in_text and not token.prose):
            return False
        if token.text == "K" and not token.spaced and self.peek(ahead - 1).kind == "number":
            return False  # K can mean kelvin or thousand
        is_factor = self.peek(ahead - 1).is_op("*", "/") or self.peek(ahead + 1).is_op("^")
        is_inch = token.text == "in" and is_factor
        return is_inch or units.known_unit(token.text) is not None

    def take_known_units(self) -> list[str]:
        """Take a product of known units, such as ``kg m/s`` or ``\\frac{m}{s}``.

        Returns:
            The words for ``units.canonical_unit``; [] if no known unit follows.
        """
        words = self._take_unit_fraction(in_text=False)
        while len(words) < _MAX_UNIT_WORDS:
            ahead = int(bool(words) and self.peek().is_op("*", "/"))
            if not self.is_known_unit(ahead):
                break
            words += [self.take().text for _ in range(ahead + 1)]
            words += filter(None, [self.take_unit_exponent()])
        return words + (self.take_divisor_in_brackets() if words else [])

    def is_product_of_units(self) -> bool:
        """Return whether a product of known units follows in which not all units are letters."""
        start = self.position
        words = [word for word in self.take_known_units() if word.isalpha()]
        self.position = start
        return len(words) > 1 and max(map(len, words)) > 1

    def take_divisor_in_brackets(self) -> list[str]:
        """Take the divisor ``/(kg K)`` of a unit; return its words, [] if there is none."""
        start = self.position
        if self.take_op("/") and (group := self._take_unit_group("(", ")", in_text=False)):
            return ["/", "(", *group, ")"]
        self.position = start
        return []

    def _take_unit_fraction(self, *, in_text: bool) -> list[str]:
        """Take ``\\frac{m}{s}`` and return its words; [] if no fraction of units follows."""
        start = self.position
        if self.take().is_command("frac"):
            top = self._take_unit_group("{", "}", in_text=in_text)
            bottom = self._take_unit_group("{", "}", in_text=in_text) if top else []
            if bottom:
                return [*top, "/", "(", *bottom, ")"]
        self.position = start
        return []

    def is_unit_fraction(self, *, in_text: bool) -> bool:
        """Return whether a fraction of known units follows, such as ``\\frac{m}{s}``."""
        start = self.position
        words = self._take_unit_fraction(in_text=in_text)
        self.position = start
        return bool(words)

    def _take_unit_group(self, opening: str, closing: str, *, in_text: bool) -> list[str]:
        """Take known units between brackets; return [] if the brackets contain anything else.

        In this case, the caller must reset ``position``.
        """
        words: list[str] = []
        if not self.take_op(opening):
            return []
        while not self.take_op(closing):
            if words:
                self.take_op("*")
            if len(words) > _MAX_UNIT_WORDS or not self.is_known_unit(in_text=in_text):
                return []
            words.append(self.take().text)
            words += filter(None, [self.take_unit_exponent()])
        return words

    def take_unit_exponent(self) -> str:
        """Take the exponent of a unit, such as ``^2`` or ``^{-1}``; return "" if there is none."""
        braced = self.peek(1).is_op("{", "(")
        sign = self.peek(1 + braced).text if self.peek(1 + braced).is_op("-", "+") else ""
        ahead = 1 + braced + len(sign)
        number = self.peek(ahead)
        closed = not braced or self.peek(ahead + 1).is_op("}", ")")
        is_integer = number.kind == "number" and number.value.denominator == 1
        if not self.peek().is_op("^") or not is_integer or not closed:
            return ""
        self.position += ahead + 1 + braced
        return f"^{sign.strip('+')}{number.value.numerator}"

    @contextmanager
    def limit_depth(self) -> Iterator[None]:
        """Return a context manager for a nested bracket that limits the depth of the recursion.

        Raises:
            NotUnderstood: The brackets are nested too deeply.
        """
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotUnderstood("brackets too deep")
        yield
        self._depth -= 1


def mixed_number(whole: Fraction, top: Fraction, bottom: Fraction) -> Fraction:
    """Return the value of a mixed number, such as 5 1/2: whole + top / bottom.

    Raises:
        NotUnderstood: The fraction is not between 0 and 1.
    """
    if not bottom or not 0 < top / bottom < 1:
        raise NotUnderstood("a mixed number whose fraction is not below one")
    return whole + top / bottom
