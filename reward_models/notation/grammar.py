"""Parse mathematics in LaTeX or plain text to a tree, by this grammar:

answer   = item {("," | ";" | "and" | "or") item}
item     = relation [unit]
relation = set {("=" | "<" | ... | "\\in") set}
set      = sum {("\\cup" | "\\cap") sum}
sum      = [sign] term {("+" | "-" | "\\pm" | "\\mp") term}
term     = power {["*" | "/"] power}
power    = postfix ["^" exponent]

A text with a symbol that cannot be parsed is rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from rlhf.reward_models.notation import units
from rlhf.reward_models.notation.lexer import NotUnderstood, Token, tokens_of, word_set
from rlhf.reward_models.notation.reader import TokenReader, mixed_number

MAX_TOKENS = 1500
_RELATION_OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in")
_FUNCTION_NAMES = word_set(
    "sin cos tan cot sec csc asin acos atan arcsin arccos arctan sinh cosh tanh log ln "
    "lg exp abs gcd lcm max min floor ceil det"
)
_CONSTANTS = {"pi": "pi", "infty": "oo", "infinity": "oo", "oo": "oo", "emptyset": "emptyset"}
_GREEK_LETTERS = word_set(
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega "
    "psi chi eta zeta xi kappa ell Delta Gamma Theta Lambda Sigma Phi Omega Psi"
)
_MATRIX_ENVIRONMENTS = ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix")
_ROUNDING_BRACKETS = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}
_NO_FACTORS = ("circ", "end", "and", "or", "to", "over", "choose", "rfloor", "rceil")
"""Commands that do not begin a factor of a product."""
_CLOSING_BRACKETS = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}", "}"), "{": ("}", "\\}")}
_FUNCTION_LETTERS = "fghFGH"


@dataclass(frozen=True)
class Node:
    """A node of the tree of an answer.

    ``kind`` is a kind of expression, such as "add" or "number", ``args`` are the children, and
    ``data`` is the content of a leaf, such as a value or a name.
    """

    kind: str
    args: tuple[Node, ...] = ()
    data: str | Fraction | tuple | None = None


def parse_answer(text: str, *, in_math_mode: bool = True) -> Node:
    """Parse an answer.

    Args:
        text: The answer without surrounding sentences.
        in_math_mode: Whether to treat the text as if it were between math delimiters. Between
            delimiters, a word is a product of letters.

    Raises:
        NotUnderstood: A part of the text cannot be parsed.
    """
    tokens = tokens_of(text, in_math_mode=in_math_mode)
    tokens = [t for t in tokens if t.kind not in ("delimiter", "line")]
    while tokens and (
        (tokens[-1].kind == "punctuation" and tokens[-1].text == ".") or tokens[-1].is_op(",")
    ):
        tokens.pop()
    if not tokens:
        raise NotUnderstood("empty")
    if len(tokens) > MAX_TOKENS:
        raise NotUnderstood(f"longer than {MAX_TOKENS} symbols")
    for token in tokens:
        if token.kind == "unknown" or token.text in ("...", "dots"):
            raise NotUnderstood(f"the unknown symbol {token.text!r}")
    in_words = _words_if_text_answer(tokens)
    if in_words is not None:
        return Node("text", data=in_words)
    reader = _MathReader(tokens)
    node = reader.answer()
    if reader.peek().kind != "end":
        raise NotUnderstood(f"{reader.peek().text!r} after the end of the answer")
    return node


def _words_if_text_answer(tokens: list[Token]) -> tuple[str, ...] | None:
    """Return the words of an answer such as ``\\text{even}`` or ``\\text{(B)}`` in lower case.

    The word "and" is omitted. The result is None if the answer does not consist of words.
    """
    kinds = {token.kind for token in tokens}
    if not kinds <= {"word", "operator", "punctuation"} or "word" not in kinds:
        return None
    if any(
        token.text == "?" or (token.kind == "operator" and token.text not in "(),;-{}")
        for token in tokens
    ):
        return None
    words = [token for token in tokens if token.kind == "word"]
    single = (
        len(words) == 1
        and len(words[0].text) > 2
        and words[0].text.lower() not in _FUNCTION_NAMES | set(_CONSTANTS)
    )
    if not all(word.prose for word in words) and not single:
        return None
    return tuple(word.text.lower() for word in words if word.text.lower() != "and")


class _MathReader(TokenReader):
    """Recursive-descent parser of an answer.

    The methods that return a node parse the expression that their name states, and move past it;
    the grammar is in the docstring of the module. They raise NotUnderstood if the next tokens are
    no such expression.
    """

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self.bars = 0

    # Answers

    def answer(self) -> Node:
        items, joints = [self.item()], set()
        while (joint := self._take_separator()) is not None:
            joints.add(joint)
            items.append(self.item())
        joints = joints - {","} or joints
        if len(joints) > 1:
            raise NotUnderstood('both "and" and "or"')
        items = _with_repeated_name(items)
        return items[0] if len(items) == 1 else Node("list", tuple(items), "".join(joints))

    def items(self) -> list[Node]:
        items = [self.item()]
        while self.take_op(",", ";"):
            items.append(self.item())
        return items

    def _take_separator(self) -> str | None:
        """Take a separator of items: a comma, "and" or "or", or a comma before one of these words.

        Returns:
            The word if there is one, "," if there is only a comma, and None without a separator.
        """
        comma = self.take_op(",", ";")
        token = self.peek()
        word = token.text.lower() if token.kind in ("word", "command") else ""
        if word in ("and", "or"):
            self.take()
            return word
        return "," if comma else None

    def item(self) -> Node:
        with self.limit_depth():
            node, words = self.relation(), self._unit()
            if words and units.cannot_end_unit(words[-1]):
                raise NotUnderstood("a unit that is cut off")
            unit = units.canonical_unit(words)
            if self.peek().is_command("over", "choose") and not unit:
                kind = "divide" if self.take().text == "over" else "binomial"
                node = Node(kind, (node, self.relation()))
            letters = self._unit_as_letters(words)
        if unit and letters is not None and node.kind != "relation":
            return Node("unit", (node, Node("multiply", (node, letters))), unit)
        return Node("unit", (node,), unit) if unit else node

    def _unit_as_letters(self, words: list[str]) -> Node | None:
        """Return the product of the letters of a unit, as in ``2 hr``; None for other units."""
        token = self.peek(-1)
        if len(words) != 1 or token.prose or not words[0].isalpha() or not 1 < len(words[0]) <= 3:
            return None
        return _letters_node(words[0])

    def relation(self) -> Node:
        parts, operators = [self.union()], []
        while (operator := self.take_op(*_RELATION_OPERATORS)) is not None:
            operators.append(operator)
            parts.append(self.union())
        return Node("relation", tuple(parts), tuple(operators)) if operators else parts[0]

    def union(self) -> Node:
        node = self.sum()
        while (operator := self.take_op("cup", "cap", "setminus")) is not None:
            node = Node(operator, (node, self.sum()))
        return node

    def sum(self) -> Node:
        sign = self.take_op("+", "-", "+-", "-+")
        currency = self.take_currency()
        if currency and sign is None:
            sign = self.take_op("+", "-")
        node = self.term()
        if sign in ("+-", "-+"):
            node = _plus_minus_node(sign, _number_node(0), node)
        elif sign == "-":
            node = _negative_node(node)
        while (operator := self.take_op("+", "-", "+-", "-+")) is not None:
            right = self.term()
            if operator in ("+-", "-+"):
                node = _plus_minus_node(operator, node, right)
            else:
                node = Node("add", (node, _negative_node(right) if operator == "-" else right))
        return Node("unit", (node,), currency) if currency else node

    def term(self) -> Node:
        node = self.power()
        while True:
            operator = self.take_op("*", "/")
            if operator:
                kind = "multiply" if operator == "*" else "divide"
                node = Node(kind, (node, self._signed_power()))
            elif self._starts_factor():
                node = Node("multiply", (node, self.power()))
            else:
                return node

    def _starts_factor(self) -> bool:
        """Return whether the next token begins a factor after an implicit multiplication sign."""
        token = self.peek()
        if token.kind == "word":
            return self._is_variable_or_function(token)
        if token.kind == "command":
            if self.is_unit_fraction(in_text=True):
                return False
            return token.text not in _NO_FACTORS
        return token.is_op("(", "{") or (token.is_op("|") and not self.bars)

    def _is_variable_or_function(self, token: Token) -> bool:
        """Return whether a word is a function, a variable, or a product of variables."""
        word = token.text
        if token is self.peek() and self._is_unit_with_name_of_function():
            return False
        if (
            word in _FUNCTION_NAMES
            or word in _CONSTANTS
            or word in _GREEK_LETTERS
            or word in ("sqrt", "cbrt")
        ):
            return not token.prose
        if token.prose or word.lower() in ("or", "and", "not", "is", "to", "of", "if", "no"):
            return False
        before, after = self.peek(-1), self.peek(1)
        if before.kind == "number" and token is self.peek() and self.is_product_of_units():
            return False
        if len(word) == 1:
            return True
        if self._is_power_of_letters():
            return True
        if before.kind == "number" and (token.spaced or not token.math) and self.is_known_unit():
            return False
        if token.math or len(word) > 3:
            return len(word) <= 3
        is_sign = after.is_op("+", "-") and after.spaced and not self.peek(2).spaced
        next_to_symbols = all(
            t.kind in ("operator", "end") or (t.kind == "number" and t is before)
            for t in (before, after)
        )
        return next_to_symbols and not is_sign

    def _is_unit_with_name_of_function(self) -> bool:
        """Return whether minutes or seconds follow, as in ``2 min``, and not a function."""
        after = self.peek(1)
        has_argument = after.kind in ("number", "word", "command") or after.is_op(
            "(", "{", "^", "_"
        )
        is_unit = self.peek().text in _FUNCTION_NAMES and self.is_known_unit()
        return is_unit and self.peek(-1).kind == "number" and not has_argument

    def power(self) -> Node:
        base = self.postfix()
        in_brackets = self.peek(-1).kind != "word"
        if self.is_degree() or not self.take_op("^"):
            return base
        if base.kind != "letters" or in_brackets:
            return Node("power", (base, self.exponent()))
        # Only the last letter is raised, as in ab^2.
        before, last = base.args[0].args
        exponent = self.exponent()
        value = exponent.args[0].data if exponent.kind == "negative" else exponent.data
        name = f"{base.data}^{'-' if exponent.kind == 'negative' else ''}{value}"
        return Node("letters", (Node("multiply", (before, Node("power", (last, exponent)))),), name)

    def exponent(self) -> Node:
        return self._braced() if self.peek().is_op("{") else self._signed_power()

    def _signed_power(self) -> Node:
        sign = self.take_op("-", "+")
        return _negative_node(self.power()) if sign == "-" else self.power()

    def postfix(self) -> Node:
        node = self.atom()
        while True:
            in_brackets = self.peek(-1).kind != "word"
            if self.take_op("!"):
                node = Node("factorial", (node,)) if in_brackets else _factorial_node(node)
            elif self.take_op("%"):
                node = Node("percent", (node,))
            elif self.take_degree():
                node = self._angle_or_temperature(node)
            elif scale := units.SCALES.get(self.peek().text.lower()):
                self.take()
                node = Node("multiply", (node, Node("number", data=Fraction(scale))))
            elif self.peek().is_op("_") and node.kind in ("number", "symbol"):
                node = self._subscript(node)
            else:
                return node

    def _angle_or_temperature(self, node: Node) -> Node:
        """Return an angle, or a temperature if a scale ends the value, as in ``5^\\circ C``."""
        token, after = self.peek(), self.peek(1)
        ends = after.kind in ("end", "punctuation") or after.is_op(",", ";", ")", "}")
        scale = units.temperature_scale(token.text) if token.kind == "word" and ends else None
        if scale is None:
            return Node("degree", (node,))
        self.take()
        return Node("unit", (node,), scale)

    def _subscript(self, node: Node) -> Node:
        """Parse the subscript of the variable ``node``, or the base of the number ``node``."""
        digits = self.peek(-1).text
        self.take()
        braced = self.take_op("{")
        parts = []
        while self.peek().kind in ("number", "word", "command") and (braced or not parts):
            parts.append(self.take().text)
        if braced:
            self.expect("}")
        name = "".join(parts)
        if not name:
            raise NotUnderstood("an empty or unknown subscript")
        if node.kind == "symbol":
            return Node("symbol", data=f"{node.data}_{name}")
        return _number_in_base_node(digits, name)

    # Atoms

    def atom(self) -> Node:
        token = self.peek()
        if token.kind == "number":
            return self._numeral()
        if token.kind == "word" and self._is_variable_or_function(token):
            return self._word()
        if token.kind == "command":
            return self._command()
        if token.is_op("|"):
            return self._absolute()
        if token.is_op("(", "[", "\\{", "{"):
            return self._brackets()
        raise NotUnderstood(f"{token.text!r} where a value is expected")

    def _numeral(self) -> Node:
        """Parse a number or a mixed number; of the product ``5\\frac{x}{2}``, only the 5."""
        token = self.take()
        whole = token.value
        if whole.denominator > 1 or token.text == "vulgar":
            return _number_node(whole)
        mixed = self.take_mixed_fraction(whole)
        is_unit = self.is_unit_fraction(in_text=True)
        if mixed is not None or is_unit or not self.peek().is_command("frac"):
            return _number_node(whole if mixed is None else mixed)
        start = self.position
        fraction = self._command()
        top, bottom = fraction.args or (fraction, fraction)
        if top.kind == bottom.kind == "number":
            assert isinstance(top.data, Fraction)
            assert isinstance(bottom.data, Fraction)
            return _number_node(mixed_number(whole, top.data, bottom.data))
        self.position = start
        return _number_node(whole)

    def _word(self) -> Node:
        word = self.take().text
        if word in ("sqrt", "cbrt"):
            self.expect("(")
            radicand = self.item()
            self.expect(")")
            return Node("root", (radicand, _number_node(2 if word == "sqrt" else 3)))
        if (named := self._named_constant_or_function(word)) is not None:
            return named
        if len(word) == 1:
            while self.peek().text in ("'", "’"):
                self.take()
                word += "'"
        if self._is_applied(word):
            return Node("applied", self._arguments(), word)
        if word.endswith("'"):
            return Node("symbol", data=word)
        return (
            _letter_node(word) if len(word) == 1 else Node("letters", (_letters_node(word),), word)
        )

    def _named_constant_or_function(self, name: str) -> Node | None:
        """Parse a function, a constant or a Greek letter after its name; None for other names."""
        if name in _FUNCTION_NAMES:
            return self._function(name)
        if name in _CONSTANTS:
            return Node("constant", data=_CONSTANTS[name])
        return Node("symbol", data=name) if name in _GREEK_LETTERS else None

    def _is_applied(self, name: str) -> bool:
        """Return whether a name before brackets is a function, as in f(x) or ``P(A) =``."""
        opening = self.peek()
        if not opening.is_op("(") or opening.spaced or len(name.rstrip("'")) != 1:
            return False
        if name in _FUNCTION_LETTERS or name.endswith("'"):
            return True
        depth = 0
        for ahead in range(len(self.tokens) - self.position):
            depth += self.peek(ahead).is_op("(") - self.peek(ahead).is_op(")")
            if depth == 0:
                return name in "PQEV" and self.peek(ahead + 1).is_op("=")
        return False

    def _command(self) -> Node:
        token = self.take()
        name = token.text
        if name == "frac":
            return self._fraction()
        if name == "sqrt":
            return self._root(token)
        if name == "binom":
            return Node("binomial", (self._argument(), self._argument()))
        if name in _ROUNDING_BRACKETS:
            return self._floor_or_ceiling(name)
        if name == "begin":
            return self._matrix()
        if (named := self._named_constant_or_function(name)) is not None:
            return named
        raise NotUnderstood(f"the unknown command \\{name}")

    def _floor_or_ceiling(self, opening: str) -> Node:
        """Parse the rest of ``\\lfloor x \\rfloor`` or ``\\lceil x \\rceil``."""
        node = self.item()
        closing, function = _ROUNDING_BRACKETS[opening]
        if not self.take().is_command(closing):
            raise NotUnderstood(f"\\{opening} without \\{closing}")
        return Node("function", (node,), function)

    def _fraction(self) -> Node:
        """Parse the two arguments of ``\\frac``; a derivative such as dy/dx is one variable."""
        top, bottom = self._argument(), self._argument()
        if _is_differential(top) and _is_differential(bottom):
            return Node("symbol", data=f"d{top.args[-1].data}/d{bottom.args[-1].data}")
        return Node("divide", (top, bottom))

    def _argument(self) -> Node:
        """Parse a group in braces, or one digit, letter or command."""
        token = self.peek()
        if token.is_op("{"):
            return self._braced()
        if token.kind == "number" and token.text.isdigit():
            return _number_node(int(self.take_first_character()))
        if token.kind == "word" and not token.prose:
            return _letter_node(self.take_first_character())
        if token.kind == "command":
            return self._command()
        raise NotUnderstood("a missing argument")

    def _braced(self) -> Node:
        self.expect("{")
        node = self.item()
        self.expect("}")
        return node

    def _root(self, command: Token) -> Node:
        index = _number_node(2)
        if self.take_op("["):
            index = self.item()
            self.expect("]")
        after = self.peek()
        if after.is_op("("):
            return Node("root", (self._brackets(), index))
        if after.kind != "number":
            return Node("root", (self._argument(), index))
        if command.end - command.start > 1 and len(after.text) > 1:
            raise NotUnderstood("a root of several digits without braces")
        return Node("root", (_number_node(self.take().value), index))

    def _function(self, name: str) -> Node:
        """Parse the exponent, the base and the arguments of a function after its name.

        The exponent -1 is read as the inverse function.
        """
        exponent = base = None
        for _ in range(2):
            if self.take_op("^"):
                exponent = self.exponent()
            elif self.take_op("_"):
                base = self._argument() if self.peek().is_op("{") else self.postfix()
        if self.peek().is_op("(") or self.peek().is_op("{"):
            arguments = self._arguments()
        else:
            argument = self.power()
            while self._starts_factor() and not self._starts_function():
                argument = Node("multiply", (argument, self.power()))
            arguments = (argument,)
        node = Node("function", (*arguments, base) if base else arguments, name)
        if exponent is None:
            return node
        if exponent == _negative_node(_number_node(1)):
            return Node("function", arguments, f"inverse {name}")
        return Node("power", (node, exponent))

    def _arguments(self) -> tuple[Node, ...]:
        opening = self.expect("(", "{")
        items = self.items()
        self.expect(")" if opening == "(" else "}")
        return tuple(items)

    def _starts_function(self) -> bool:
        token = self.peek()
        return token.kind in ("word", "command") and token.text in _FUNCTION_NAMES

    def _absolute(self) -> Node:
        self.expect("|")
        self.bars += 1
        node = self.item()
        self.bars -= 1
        self.expect("|")
        return Node("function", (node,), "abs")

    def _brackets(self) -> Node:
        """Parse a group, tuple, interval or set.

        The kind depends on the brackets and on the number of items.
        """
        opening = self.expect("(", "[", "\\{", "{")
        bars, self.bars = self.bars, 0
        if opening == "[" and self.peek().is_command("begin"):
            items = [self.item()]
        elif opening == "\\{" and self.peek(1).is_op(":", "|") and self.peek().kind == "word":
            self.position += 2
            condition = self.item()
            self.expect("\\}")
            return condition
        else:
            self._split_comma_numbers_in_brackets()
            items = self.items() if not self.peek().is_op("\\}", "}") else []
        closing = self.expect(*_CLOSING_BRACKETS[opening])
        self.bars = bars
        return _bracketed_node(opening, closing, items)

    def _split_comma_numbers_in_brackets(self) -> None:
        """Split numbers such as 3,100 between brackets at their commas: ``(3,100)`` is a pair."""
        depth, position = 0, self.position
        while position < len(self.tokens):
            token = self.tokens[position]
            if token.is_op("(", "[", "\\{", "{"):
                depth += 1
            elif token.is_op(")", "]", "\\}", "}"):
                depth -= 1
                if depth < 0:
                    return
            elif token.groups and not any(g[0] == "0" for g in token.groups[1:]):
                parts: list[Token] = []
                for digits in token.groups:
                    if parts:
                        parts.append(Token("operator", ",", token.start, token.end))
                    value = Fraction(int(digits))
                    parts.append(Token("number", digits, token.start, token.end, value=value))
                self.tokens[position : position + 1] = parts
            position += 1

    def _matrix(self) -> Node:
        name = self._environment_name()
        if name not in _MATRIX_ENVIRONMENTS:
            raise NotUnderstood(f"the unknown environment {name}")
        rows, row = [], [self.item()]
        while not self.peek().is_command("end"):
            if self.take_op("&"):
                row.append(self.item())
                continue
            self.expect("\\\\")
            rows.append(tuple(row))
            if self.peek().is_command("end"):
                row = []
                break
            row = [self.item()]
        self.take()
        if self._environment_name() != name:
            raise NotUnderstood("a matrix that is not closed")
        rows += [tuple(row)] if row else []
        if len({len(r) for r in rows}) != 1:
            raise NotUnderstood("a matrix with rows of different lengths")
        return Node("matrix", tuple(Node("row", r) for r in rows))

    def _environment_name(self) -> str:
        self.expect("{")
        name = self.take().text
        self.expect("}")
        return name

    # Units

    def _unit(self) -> list[str]:
        """Parse the unit after an item, such as ``\\text{ feet}`` or ``cm^2``.

        The result contains the words of the unit, and is empty if there is no unit.
        """
        if currency := self.take_currency():
            return [currency]
        words: list[str] = []
        starts = self._is_unit_word(self.peek()) or self.is_product_of_units()
        if starts or self.is_unit_fraction(in_text=True):
            words = self.take_known_units()
        while len(words) < 6:
            token = self.peek()
            divides = bool(words) and token.is_op("/")
            if divides and (self.is_known_unit(1) or self._is_unit_word(self.peek(1))):
                words += [self.take().text, self.take().text]
            elif self._is_unit_word(token):
                words.append(self.take().text)
            elif words and (exponent := self.take_unit_exponent()):
                words.append(exponent)
            elif token.kind == "punctuation" and token.text == "." and words:
                self.take()
            else:
                break
        return words

    def _is_unit_word(self, token: Token) -> bool:
        """Return whether a word after a value is read as a part of its unit."""
        word = token.text
        if token.kind != "word" or word.lower() in units.NOT_UNITS:
            return False
        if token is self.peek() and self._is_power_of_letters():
            return False
        long = len(word) > 1
        is_known = token is self.peek() and (
            self.is_known_unit() or (word in ("square", "cubic") and self.is_known_unit(1))
        )
        return (is_known and token.prose) or (long and (token.prose or not token.math or is_known))

    def _is_power_of_letters(self) -> bool:
        """Return whether the next word and its positive power are a product of letters.

        In ``\\pi hr^2``, ``hr^2`` is h * r^2, because hours have no square. Lengths have powers.
        """
        token, sign = self.peek(), self.peek(2)
        unit = units.known_unit(token.text)
        if unit is None or unit in units.LENGTHS or token.prose or len(token.text) > 3:
            return False
        is_negative = sign.is_op("-") or (sign.is_op("{") and self.peek(3).is_op("-"))
        return self.peek(1).is_op("^") and not is_negative


def _with_repeated_name(items: list[Node]) -> list[Node]:
    """Return the items of a list such as ``x = 1, 2`` as ``x = 1, x = 2``; others as they are."""
    first, *others = items
    is_named = first.kind == "relation" and first.data == ("=",) and first.args[0].kind == "symbol"
    if not others or not is_named or any(_has_relation(item) for item in others):
        return items
    return [first, *(Node("relation", (first.args[0], item), ("=",)) for item in others)]


def _has_relation(node: Node) -> bool:
    return node.kind == "relation" or (node.kind == "unit" and _has_relation(node.args[0]))


def _number_node(value: int | Fraction) -> Node:
    return Node("number", data=Fraction(value))


def _factorial_node(node: Node) -> Node:
    """Return the factorial of a node; of a product of letters, only that of the last letter."""
    if node.kind != "letters":
        return Node("factorial", (node,))
    before, last = node.args[0].args
    return Node("multiply", (before, Node("factorial", (last,))))


def _negative_node(node: Node) -> Node:
    return Node("negative", (node,))


def _plus_minus_node(operator: str, left: Node, right: Node) -> Node:
    """Return left ± right; left ∓ right is left ± (-right)."""
    return Node("pm", (left, _negative_node(right) if operator == "-+" else right))


def _letter_node(letter: str) -> Node:
    """Return the node of a letter: the constants e and i, or a variable."""
    if letter in ("e", "i"):
        return Node("constant", data=letter)
    return Node("symbol", data=letter)


def _letters_node(word: str) -> Node:
    """Return the product of the letters of a word."""
    node = _letter_node(word[0])
    for letter in word[1:]:
        node = Node("multiply", (node, _letter_node(letter)))
    return node


def _is_differential(node: Node) -> bool:
    """Return whether the node is the letter d before a variable, as in dy/dx."""
    if node.kind == "letters":
        node = node.args[0]
    letters = [part.data for part in node.args]
    return (
        node.kind == "multiply"
        and len(letters) == 2
        and letters[0] == "d"
        and node.args[1].kind == "symbol"
    )


def _number_in_base_node(digits: str, base: str) -> Node:
    """Return the number with these digits in a base; raise NotUnderstood if it is not valid."""
    if not digits.isdigit() or not base.isdigit() or not 2 <= int(base) <= 36 or len(digits) > 200:
        raise NotUnderstood("a base that is not from 2 to 36, or too many digits")
    if max(int(digit) for digit in digits) >= int(base):
        raise NotUnderstood("a digit that is not below its base")
    return Node("based", (_number_node(int(digits, int(base))),), base)


def _bracketed_node(opening: str, closing: str, items: list[Node]) -> Node:
    """Return the group, tuple, interval, set or matrix of items between brackets.

    Raises:
        NotUnderstood: The number of items does not fit the brackets.
    """
    if opening in ("\\{", "{"):
        if opening == "{" and len(items) == 1:
            return items[0]
        return Node("set", tuple(items)) if items else Node("constant", data="emptyset")
    if len(items) == 1:
        if (opening, closing) == ("(", ")"):
            return items[0]
        if items[0].kind == "matrix" and (opening, closing) == ("[", "]"):
            return items[0]
        raise NotUnderstood("one value between square brackets")
    if len(items) != 2 and (opening, closing) != ("(", ")"):
        raise NotUnderstood("brackets that are neither a tuple nor an interval")
    return Node("brackets", tuple(items), (opening, closing))
