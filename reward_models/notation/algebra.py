"""Compare two answers with sympy; answers are equal only if sympy proves it.

Values are compared exactly, so 0.33 is not 1/3. Equations are equal up to a constant factor.
Inequalities are equal up to a positive factor, or if they have the same set of solutions. The items
of a collection can be in any order. Tuples and intervals are compared item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from operator import add, mul, neg
from typing import Any

import sympy as sp

from rlhf.reward_models.notation import units
from rlhf.reward_models.notation.grammar import Node
from rlhf.reward_models.notation.lexer import NotUnderstood, word_set

_MAX_BITS = 50_000
_MAX_POWER = 1000
_MAX_FACTORIAL = 1000
_NUM_EVALUATED_DIGITS = 40
_TINY = sp.Float(10) ** -25
_SET_OPERATIONS = {"cup": sp.Union, "cap": sp.Intersection, "setminus": sp.Complement}
_CONDITIONS = {"or": sp.Union, "and": sp.Intersection}
_EMPTY_SET = Node("constant", data="emptyset")
_INEQUALITIES = ("<", "<=", ">", ">=")
_TRIGONOMETRIC_FUNCTIONS = word_set("sin cos tan cot sec csc")
_SYMPY_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log",
                "ceil": "ceiling", "abs": "Abs", "max": "Max", "min": "Min"}  # fmt: skip


def same_answer(reference: Node, answer: Node) -> bool:
    """Return whether an answer equals the reference.

    Raises:
        NotUnderstood: A part of the reference or of the answer has no value, such as a division by
            zero.
    """
    reference, answer = (
        _unit_as_letters_if_other_has_letters(reference, answer),
        _unit_as_letters_if_other_has_letters(answer, reference),
    )
    reference, answer = (
        _membership_as_equations(reference, answer),
        _membership_as_equations(answer, reference),
    )
    (reference, unit), (answer, answer_unit) = _split_unit(reference), _split_unit(answer)
    if bool(unit) != bool(answer_unit):
        answer, answer_unit = _symbols_as_unit_if_expected(answer, answer_unit, expected=unit)
        reference, unit = _symbols_as_unit_if_expected(reference, unit, expected=answer_unit)
    if not units.agree_or_missing(unit, answer_unit):
        return False
    if "text" in (reference.kind, answer.kind):
        return _words_of_answer(reference) is not None and _words_of_answer(
            reference
        ) == _words_of_answer(answer)
    reference_items, answer_items = (
        _items_or_plus_minus_values(reference),
        _items_or_plus_minus_values(answer),
    )
    if len(reference_items) > 1 or len(answer_items) > 1 or "set" in (reference.kind, answer.kind):
        return _same_collections(reference, answer, reference_items, answer_items)
    reference, answer = _reduce_equations(reference_items[0]), _reduce_equations(answer_items[0])
    reference, answer = _without_assigned_name(reference, answer)
    if reference.kind == answer.kind == "relation" and _same_relations(reference, answer):
        return True
    if _is_set_or_inequality(reference) or _is_set_or_inequality(answer):
        return _same_sets(reference, answer)
    kinds = {reference.kind, answer.kind}
    if kinds & {"brackets", "matrix", "row"}:
        return (
            len(kinds) == 1
            and reference.data == answer.data
            and _same_children_in_order(reference, answer)
        )
    if "relation" in kinds:
        return False
    if "based" in kinds:
        return reference == answer
    return provably_equal(to_sympy(reference), to_sympy(answer))


def check_reference_has_value(node: Node) -> None:
    """Check that a reference answer has a value.

    Raises:
        NotUnderstood: The answer has no value, or is a relation that is always or never true.
    """
    for part in _subtrees(node):
        if part.kind == "relation" and not _has_symbols(part):
            raise NotUnderstood("a relation without a variable")
    if not same_answer(node, node):
        raise NotUnderstood("sympy does not prove that the answer equals itself")


def _split_unit(node: Node) -> tuple[Node, str]:
    """Return an answer without its unit, and the unit; the unit is empty if there is none.

    A percentage remains a part of the answer.

    Raises:
        NotUnderstood: The answer has two units.
    """
    unit = ""
    while node.kind == "unit":
        if node.data == units.PERCENT:
            node = Node("percent", node.args)
            break
        assert isinstance(node.data, str)
        if unit and unit != node.data:
            raise NotUnderstood("two units")
        node, unit = node.args[0], node.data
    if node.kind == "negative" and node.args[0].kind == "unit":
        inner, unit = _split_unit(node.args[0])
        node = Node("negative", (inner,))
    return (node.args[0], unit or "deg") if node.kind == "degree" else (node, unit)


def _unit_as_letters_if_other_has_letters(node: Node, other: Node) -> Node:
    """Return an answer whose unit is read as a product of letters if the other answer has letters.

    ``2 hr`` is two hours beside ``2``, and the product of 2, h and r beside ``2rh``.
    """
    if node.kind != "unit" or len(node.args) < 2 or other.kind == "unit" or not _has_symbols(other):
        return node
    is_same_unit = units.canonical_unit(_number_and_unit_words(other)[1]) == node.data
    return node if is_same_unit else node.args[1]


def _symbols_as_unit_if_expected(node: Node, unit: str, *, expected: str) -> tuple[Node, str]:
    """Return an answer and its unit; symbols after a number are its unit if it is ``expected``.

    The letters of ``12 m/s`` can be variables or a unit, so the other answer decides.
    """
    if unit or not expected:
        return node, unit
    value, names = _number_and_unit_words(node)
    if value is None or not names or units.canonical_unit(names) != expected:
        return node, unit
    return value, expected


def _number_and_unit_words(node: Node) -> tuple[Node | None, list[str]]:
    """Return the number and the words of the unit in a product such as ``12 m/s``.

    The number is None if there is none. The words are [] if the other factors are not known units.
    """
    if not _has_symbols(node):
        return node, []
    if node.kind == "negative":
        value, words = _number_and_unit_words(node.args[0])
        return (value and Node("negative", (value,))), words
    if node.kind in ("symbol", "letters"):
        name, mark, exponent = str(node.data).partition("^")
        known = units.canonical_unit_in_product(name) is not None
        return None, [name, *([f"^{exponent}"] if mark else [])] if known else []
    if node.kind == "power" and node.args[1].kind in ("number", "negative"):
        _, words = _number_and_unit_words(node.args[0])
        exponent = node.args[1]
        power = f"^{exponent.data}" if exponent.kind == "number" else f"^-{exponent.args[0].data}"
        return None, [*words, power] if words else []
    if node.kind not in ("multiply", "divide"):
        return None, []
    (value, words), (other, others) = map(_number_and_unit_words, node.args)
    if other is not None or not others or (node.args[0] is not value and not words):
        return None, []
    if node.kind == "divide":
        return value, [*words, "/", *(["(", *others, ")"] if len(others) > 1 else others)]
    return value, [*words, *others]


def _words_of_answer(node: Node) -> tuple[str, ...] | None:
    """Return the sorted words of an answer that consists of words, or None for other answers.

    A single letter is also a word.
    """
    if node.kind == "text":
        assert isinstance(node.data, tuple)
        return tuple(sorted(node.data))
    if node.kind in ("symbol", "letters", "constant"):
        return (str(node.data).lower(),)
    if node.kind == "list":
        parts = [_words_of_answer(child) for child in node.args]
        if all(part is not None for part in parts):
            return tuple(sorted(word for part in parts for word in part or ()))
    return None


# Collections


def _items_or_plus_minus_values(node: Node) -> list[Node]:
    """Return the items of a list or a set, or the two values of an answer with ±.

    Nested lists are flattened, but a set in a set is one item. For any other answer, the result has
    the answer as its only item.
    """
    if node.kind in ("list", "set"):
        nested = [
            [c] if c.kind == node.kind == "set" else _items_or_plus_minus_values(c)
            for c in node.args
        ]
        return [alternative for alternatives in nested for alternative in alternatives]
    if any(part.kind == "pm" for part in _subtrees(node)):
        return [_resolve_plus_minus(node, 1), _resolve_plus_minus(node, -1)]
    return [node]


def _resolve_plus_minus(node: Node, sign: int) -> Node:
    """Replace each ± by + if ``sign`` is 1, and by - if it is -1."""
    args = tuple(_resolve_plus_minus(child, sign) for child in node.args)
    if node.kind != "pm":
        return Node(node.kind, args, node.data)
    return Node("add", (args[0], args[1] if sign > 0 else Node("negative", (args[1],))))


def _same_collections(
    reference: Node, answer: Node, reference_items: list[Node], answer_items: list[Node]
) -> bool:
    """Return whether two lists or sets are equal, given their items.

    The order of the items and repeated items do not matter. If only one answer assigns its items to
    different names, as in ``x = 1, y = 2``, the items are compared in order.
    """
    if _is_joined_inequalities(reference) or _is_joined_inequalities(answer):
        return _same_sets(reference, answer)
    if (reference.kind == "set") != (answer.kind == "set") and 1 in (
        len(reference_items),
        len(answer_items),
    ):
        return False
    if reference.kind in ("cup", "cap") or answer.kind in ("cup", "cap"):
        return _same_sets(reference, answer)
    names = [{_assigned_name(item) for item in items} for items in (reference_items, answer_items)]
    if names[0] != names[1] and "" not in names[0] | names[1]:
        return False
    if max(map(len, names)) > 1 and names[0] != names[1]:
        # "1, 2" can mean x = 1, y = 2 in this order, but "1 or 2" cannot.
        joints = {str(reference.data), str(answer.data)}
        is_plain = {""} in names and "set" not in (reference.kind, answer.kind)
        return is_plain and "or" not in joints and _same_in_order(reference_items, answer_items)
    reference_items, answer_items = (
        _without_equal_items(_without_common_name(reference_items)),
        _without_equal_items(_without_common_name(answer_items)),
    )
    return len(reference_items) == len(answer_items) and all(
        any(same_answer(a, b) for b in answer_items) for a in reference_items
    )


def _without_equal_items(items: list[Node]) -> list[Node]:
    """Remove items that equal an earlier item."""
    distinct: list[Node] = []
    for item in items:
        if not any(same_answer(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def _without_common_name(items: list[Node]) -> list[Node]:
    """Return the items without their common name: 1, 2 for ``x = 1, x = 2`` and ``x = 1, 2``.

    Items that assign values to different names are returned unchanged.
    """
    names = {item.args[0] for item in items if _assigns_name(item)}
    others = [item for item in items if not _assigns_name(item)]
    if len(names) != 1 or any(item.kind == "relation" for item in others):
        return items
    return [item.args[-1] if _assigns_name(item) else item for item in items]


def _assigned_name(item: Node) -> str:
    """Return the name to which an item assigns a value, without subscript; "" if there is none."""
    return str(item.args[0].data).partition("_")[0] if _assigns_name(item) else ""


def _same_in_order(reference_items: Sequence[Node], answer_items: Sequence[Node]) -> bool:
    return len(reference_items) == len(answer_items) and all(
        map(same_answer, reference_items, answer_items)
    )


def _same_children_in_order(reference: Node, answer: Node) -> bool:
    return _same_in_order(reference.args, answer.args)


# Relations


def _assigns_name(node: Node) -> bool:
    """Return whether the node assigns a value to a name, as ``x = 5`` or ``f(x) = 2x`` does."""
    return (
        node.kind == "relation"
        and set(_operators_or_brackets(node)) == {"="}
        and _is_assignment_target(node.args[0])
    )


def _is_assignment_target(node: Node) -> bool:
    """Return whether an equation can assign a value to the node.

    The node must be a variable, a function application or a tuple of variables.
    """
    if node.kind == "brackets":
        return all(child.kind == "symbol" for child in node.args)
    return node.kind in ("symbol", "applied")


def _reduce_equations(node: Node) -> Node:
    """Reduce a chain of equations to one equation, or to a value if it is a calculation.

    ``x = 2 + 3 = 5`` becomes ``x = 5``, and ``2 + 3 = 5`` becomes 5.

    Raises:
        NotUnderstood: The equations contradict each other, are always true, or are never true, such
            as ``6 = 5``.
    """
    if node.kind != "relation" or set(_operators_or_brackets(node)) != {"="}:
        return node
    first, *others = node.args
    if any(not same_answer(part, others[-1]) for part in others[:-1]):
        raise NotUnderstood("a chain of equations that do not agree")
    last = others[-1]
    if first.kind in ("constant", "number", "negative") and _is_assignment_target(last):
        first, last = last, first
    if first.kind == "applied" or not (_is_expression(first) and _is_expression(last)):
        return Node("relation", (first, last), ("=",))
    left, right = to_sympy(first), to_sympy(last)
    if provably_equal(left, right):
        if left == right and (first == last or right == 0):
            raise NotUnderstood("an equation that is always true")
        return last
    if not (left - right).free_symbols:
        raise NotUnderstood("an equation that is never true")
    return Node("relation", (first, last), ("=",))


def _is_expression(node: Node) -> bool:
    """Return whether the node is not a collection or a text, and has no unit."""
    others = ("brackets", "set", "list", "matrix", "text", "unit", *_SET_OPERATIONS)
    return node.kind not in others and node != _EMPTY_SET


def _without_assigned_name(reference: Node, answer: Node) -> tuple[Node, Node]:
    """Return the two answers; if only one of them assigns its value to a name, remove the name.

    Otherwise, a membership such as ``x \\in (0, 1)`` is replaced by its set.
    """
    if (
        _assigns_name(answer)
        and reference.kind != "relation"
        and answer.args[0] not in _subtrees(reference)
    ):
        return reference, answer.args[-1]
    if (
        _assigns_name(reference)
        and answer.kind != "relation"
        and not _has_symbols(reference.args[-1])
    ):
        return reference.args[-1], answer
    return _set_of_membership(reference, answer), _set_of_membership(answer, reference)


def _membership_as_equations(node: Node, other: Node) -> Node:
    """Return ``x \\in \\{1, 2\\}`` as ``x = 1 or x = 2``, unless the other answer is a membership.

    Beside a set, the result is the set ``\\{1, 2\\}``.
    """
    if not _is_listed_membership(node) or (other.kind == "relation" and other.data == ("in",)):
        return node
    name, members = node.args
    if other.kind == "set":
        return members
    assigned = tuple(Node("relation", (name, member), ("=",)) for member in members.args)
    return assigned[0] if len(assigned) == 1 else Node("list", assigned, "or")


def _is_listed_membership(node: Node) -> bool:
    """Return whether the node is a membership of a variable in a set of listed items."""
    is_membership = node.kind == "relation" and node.data == ("in",)
    return is_membership and node.args[0].kind == "symbol" and node.args[1].kind == "set"


def _set_of_membership(node: Node, other: Node) -> Node:
    """Return the set in a membership such as ``x \\in (0, 1)``.

    A node is returned unchanged if it is not a membership of a variable, or if the other answer is
    a relation without this variable.
    """
    if node.kind != "relation" or node.data != ("in",) or node.args[0].kind != "symbol":
        return node
    if other.kind == "relation" and node.args[0] not in _subtrees(other):
        return node
    return node.args[1]


def _subtrees(node: Node) -> Iterator[Node]:
    """Yield the node and all nodes below it."""
    yield node
    for child in node.args[:1] if node.kind == "unit" else node.args:
        yield from _subtrees(child)


def _has_symbols(node: Node) -> bool:
    return any(part.kind in ("symbol", "applied") for part in _subtrees(node))


def _same_relations(reference: Node, answer: Node) -> bool:
    """Return whether relations are equal up to a factor, which is positive for inequalities."""
    one_name = reference.args[0] == answer.args[0] and reference.data == answer.data == ("=",)
    if one_name and same_answer(reference.args[1], answer.args[1]):
        return True
    if not all(_is_expression(part) for part in (*reference.args, *answer.args)):
        return reference.data == answer.data and _same_children_in_order(reference, answer)
    operators = (*_operators_or_brackets(reference), *_operators_or_brackets(answer))
    if len(operators) != 2 or "in" in operators:
        return False
    (first, operator), (second, other_operator) = (
        _difference_and_operator(reference),
        _difference_and_operator(answer),
    )
    if operator != other_operator:
        return False
    factor = _ratio_at_test_point(first, second)
    if factor is None or (operator in (">", ">=") and not factor.is_positive):
        return False
    return provably_equal(first, factor * second)


def _difference_and_operator(node: Node) -> tuple[Any, str]:
    """Return left - right of a relation, and the operator that compares this difference with 0.

    For "<" and "<=", the result is right - left with ">" or ">=".
    """
    left, right = (to_sympy(child) for child in node.args)
    operator = _operators_or_brackets(node)[0]
    if operator in ("<", "<="):
        return right - left, operator.replace("<", ">")
    return left - right, operator


def _ratio_at_test_point(first: Any, second: Any) -> Any:
    """Return the ratio of ``first`` to ``second`` at a test point; None if it is 0 or undefined."""
    for point in _test_points(first.free_symbols | second.free_symbols):
        a, b = first.subs(point), second.subs(point)
        if provably_equal(b, sp.Integer(0)) or not b.is_finite or not a.is_finite:
            continue
        factor = sp.nsimplify(sp.simplify(a / b))
        return None if factor == 0 else factor
    return None


# Sets


def _is_joined_inequalities(node: Node) -> bool:
    """Return whether the node is a list of inequalities that are joined by "and" or "or"."""
    is_joined = node.kind == "list" and node.data in _CONDITIONS
    return is_joined and all(_is_inequality(child) for child in node.args)


def _is_inequality(node: Node) -> bool:
    return node.kind == "relation" and all(
        op in _INEQUALITIES for op in _operators_or_brackets(node)
    )


def _operators_or_brackets(node: Node) -> tuple[str, ...]:
    """Return the operators of a relation, or the brackets of a tuple or interval; else ()."""
    return node.data if isinstance(node.data, tuple) else ()


def _is_set_or_inequality(node: Node) -> bool:
    return node.kind in ("set", *_SET_OPERATIONS) or _is_inequality(node) or node == _EMPTY_SET


def _same_sets(reference: Node, answer: Node) -> bool:
    """Return whether two answers describe the same set of real numbers; False if unknown."""
    names = [
        {part.data for part in _subtrees(n) if part.kind == "symbol"} for n in (reference, answer)
    ]
    if all(names) and names[0] != names[1]:
        return False
    first, second = _as_set(reference), _as_set(answer)
    if first is None or second is None:
        return False
    a, b = _intervals_and_points(first), _intervals_and_points(second)
    return len(a) == len(b) and all(
        p[2:] == q[2:] and provably_equal(p[0], q[0]) and provably_equal(p[1], q[1])
        for p, q in zip(a, b, strict=True)
    )


def _as_set(node: Node) -> Any:
    """Return the sympy set of real numbers that ``node`` describes.

    The result is None if the node is not such a set, or if sympy cannot solve its inequalities.
    """
    if node.kind == "brackets" and len(node.args) == 2:
        return _as_interval(node)
    if node.kind == "set":
        return sp.FiniteSet(*(to_sympy(child) for child in node.args))
    if node == _EMPTY_SET:
        return sp.EmptySet
    if node.kind in _SET_OPERATIONS or _is_joined_inequalities(node):
        parts = [_as_set(child) for child in node.args]
        names = {part for part in _subtrees(node) if part.kind == "symbol"}
        if any(part is None for part in parts) or (node.kind == "list" and len(names) != 1):
            return None
        return {**_SET_OPERATIONS, **_CONDITIONS}[str(node.data or node.kind)](*parts)
    return _solution_set(node) if _is_inequality(node) else None


def _as_interval(node: Node) -> Any:
    """Return the sympy interval of two items in brackets.

    The result is None if an end has a variable, or if the first item is not a real number.

    Raises:
        NotUnderstood: The first item is larger than the second one.
    """
    low, high = (to_sympy(child) for child in node.args)
    if low.free_symbols or high.free_symbols or not low.is_extended_real:
        return None
    if not sp.N(low) < sp.N(high) and not provably_equal(low, high):
        raise NotUnderstood("an interval whose ends are in the wrong order")
    opening, closing = _operators_or_brackets(node)
    return sp.Interval(low, high, opening == "(", closing == ")")


def _solution_set(node: Node) -> Any:
    """Return the sympy set of solutions of a chain of inequalities in one variable.

    The result is None if there are several variables, or if sympy cannot solve the inequalities.

    Raises:
        NotUnderstood: An inequality has no variable.
    """
    parts = [to_sympy(child) for child in node.args]
    symbols = set().union(*(part.free_symbols for part in parts))
    if len(symbols) != 1:
        return None
    solutions: Any = sp.S.Reals
    for i, operator in enumerate(_operators_or_brackets(node)):
        relation: Any = sp.Rel(parts[i], parts[i + 1], operator)
        if relation in (sp.true, sp.false):
            raise NotUnderstood("an inequality without a variable")
        try:
            solutions = solutions.intersect(relation.as_set())
        except (NotImplementedError, TypeError, ValueError):
            return None
    return solutions


def _intervals_and_points(real_set: Any) -> list[tuple]:
    """Return the intervals and points of a set in ascending order.

    Each element is a tuple (low end, high end, whether the low end is open, whether the high end is
    open). The two ends of a point are equal.

    Raises:
        NotUnderstood: The set has other parts than intervals and points.
    """
    parts = real_set.args if isinstance(real_set, sp.Union) else (real_set,)
    pieces: list[tuple] = []
    for part in parts:
        if part is sp.EmptySet:
            continue
        if isinstance(part, sp.Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif isinstance(part, sp.FiniteSet):
            pieces += [(point, point, False, False) for point in part.args]
        else:
            raise NotUnderstood("an unknown kind of set")
    return sorted(pieces, key=lambda piece: (float(piece[0]), float(piece[1])))


# Values


def provably_equal(a: Any, b: Any) -> bool:
    """Return whether sympy proves that two expressions are equal everywhere.

    Expressions with infinities are equal only if they are identical.
    """
    if a == b:
        return True
    if any(x.has(sp.oo, -sp.oo, sp.zoo, sp.nan) for x in (a, b)):
        return False
    difference = a - b
    if difference == 0:
        return True
    if difference.is_Rational or _is_clearly_nonzero(difference):
        return False
    proofs: list[Callable[[Any], Any]] = [
        sp.expand,
        lambda d: sp.expand(sp.numer(sp.together(d))),
        sp.radsimp,
        sp.simplify,
        lambda d: sp.simplify(sp.expand_trig(sp.expand_log(d, force=True).rewrite(sp.sin))),
        lambda d: sp.simplify(sp.gammasimp(d)),
    ]
    return any(proof(difference) == 0 for proof in proofs) or difference.equals(0) is True


def _is_clearly_nonzero(difference: Any) -> bool:
    """Return whether the absolute value of an expression exceeds 1e-25 at a test point."""
    for point in _test_points(difference.free_symbols):
        value = sp.N(difference.subs(point), _NUM_EVALUATED_DIGITS)
        if value.is_number and value.is_finite and abs(value) > _TINY:
            return True
    return False


def _test_points(symbols: Iterable[Any]) -> Iterator[dict[Any, Any]]:
    """Yield up to three test points (symbol -> value), for comparisons before a proof."""
    names = sorted(symbols, key=str)
    starts = (sp.Rational(7, 5), sp.Rational(-11, 13), sp.Rational(23, 3))
    for k, start in enumerate(starts if names else starts[:1]):
        values = (start + sp.Rational(3 * i * i + i, 7 + k) for i in range(len(names)))
        yield dict(zip(names, values, strict=True))


def to_sympy(node: Node, *, angle: bool = False) -> Any:
    """Convert a node to a sympy expression over real variables.

    Args:
        node: The node.
        angle: Whether the value is an angle. If it is, degrees are converted to radians.

    Raises:
        NotUnderstood: The node is not an expression, has no value, or contains too large numbers.
    """
    result = _to_sympy_unchecked(node, angle)
    if result.has(sp.nan, sp.zoo):
        raise NotUnderstood("division by zero")
    return result


def _to_sympy_unchecked(node: Node, angle: bool) -> Any:
    """Convert a node as `to_sympy` does; the result can contain infinities and nan."""
    kind = node.kind
    if kind == "number":
        assert isinstance(node.data, Fraction)
        return sp.Rational(node.data.numerator, node.data.denominator)
    if kind == "symbol":
        return sp.Symbol(str(node.data), real=True)
    if kind == "constant":
        if node.data not in _CONSTANTS:
            raise NotUnderstood(f"{node.data} where a value is expected")
        return _CONSTANTS[str(node.data)]
    if kind == "percent" or (kind == "unit" and node.data == units.PERCENT):
        return to_sympy(node.args[0]) / 100
    if kind in ("letters", "unit", "based"):
        return to_sympy(node.args[0], angle=angle)
    if kind == "degree":
        inner = to_sympy(node.args[0])
        return inner * sp.pi / 180 if angle else inner
    if kind == "function":
        return _function_to_sympy(node)
    if kind == "applied":
        return sp.Function(str(node.data))(*(to_sympy(child) for child in node.args))
    if kind not in _OPERATIONS:
        raise NotUnderstood(f"a {kind} where a value is expected")
    return _OPERATIONS[kind](*(to_sympy(child, angle=angle) for child in node.args))


def _divide(a: Any, b: Any) -> Any:
    if b == 0:
        raise NotUnderstood("division by zero")
    return a / b


def _checked_root(radicand: Any, index: Any) -> Any:
    """Return a root; raise NotUnderstood if the index is not from 2 to 99."""
    if not index.is_Integer or not 1 < index < 100:
        raise NotUnderstood("a root whose index is not a whole number from 2 to 99")
    if radicand.is_negative and index % 2:
        return sp.real_root(radicand, index)
    return _checked_power(radicand, 1 / index)


def _checked_combinatorial(function: Any, *numbers: Any) -> Any:
    """Return a factorial or a binomial coefficient.

    Raises:
        NotUnderstood: A number is too large, negative or not whole.
    """
    for number in numbers:
        if number.is_number and not (number.is_Integer and 0 <= number <= _MAX_FACTORIAL):
            raise NotUnderstood(
                "a factorial or binomial of a number that is negative, not whole or too large"
            )
    return function(*numbers)


def _checked_power(base: Any, exponent: Any) -> Any:
    """Return base**exponent; raise NotUnderstood if it is undefined or too large."""
    if base.is_zero and exponent.is_number and not exponent.is_positive:
        raise NotUnderstood("division by zero")
    if exponent.is_number and exponent.is_finite:
        size = abs(sp.N(exponent, 15))
        if not base.is_number and size > _MAX_POWER:
            raise NotUnderstood("number too large")
        parts = [int(part) for n in base.atoms(sp.Rational) for part in (n.p, n.q)]
        bits = max((part.bit_length() for part in parts), default=1)
        if base.is_number and size * max(bits, 2) > _MAX_BITS:
            raise NotUnderstood("number too large")
    return base**exponent


_CONSTANTS = {"pi": sp.pi, "e": sp.E, "i": sp.I, "oo": sp.oo}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "negative": neg,
    "add": add,
    "multiply": mul,
    "divide": _divide,
    "power": _checked_power,
    "root": _checked_root,
    "factorial": partial(_checked_combinatorial, sp.factorial),
    "binomial": partial(_checked_combinatorial, sp.binomial),
}


def _function_to_sympy(node: Node) -> Any:
    """Return the value of a named function; raise NotUnderstood if it has no value."""
    name = str(node.data)
    inverse = name.startswith("inverse ")
    name = name.removeprefix("inverse ")
    angle = name in _TRIGONOMETRIC_FUNCTIONS and not inverse
    parts = [to_sympy(child, angle=angle) for child in node.args]
    if inverse:
        name = f"a{name}"
    if name in ("log", "ln", "lg"):
        base = sp.Integer(10) if name == "lg" else (parts[1:] or [sp.E])[0]
        if parts[0] == 0 or base in (0, 1) or len(parts) > 2:
            raise NotUnderstood("a logarithm without a value")
        return sp.log(parts[0]) / sp.log(base)
    name = _SYMPY_NAMES.get(name, name)
    many = name in ("Max", "Min", "gcd", "lcm")
    if name not in dir(sp) or (len(parts) != 1 and not many):
        raise NotUnderstood(f"the function {name} with {len(parts)} arguments")
    if name in ("gcd", "lcm") and not all(part.is_Integer for part in parts):
        raise NotUnderstood(f"{name} of values that are not whole numbers")
    return getattr(sp, name)(*parts)
