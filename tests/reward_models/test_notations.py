"""Verifiers on a table of notations, and on the references of public datasets."""

import gzip
import json
import os
import re
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.common.fences import code_of_reply
from rlhf.envs.parsing import PARSERS
from rlhf.reward_models import build
from rlhf.reward_models.math_check import answer_verdict_and_reason, parse_reference_answer
from rlhf.reward_models.notation.lexer import NotUnderstood, tokens_of
from rlhf.reward_models.notation.quantity import Quantity, parse_final_quantity, parse_quantity

TABLE = Path(__file__).with_name("notations.jsonl")
MORE = Path(__file__).with_name("notations_more.jsonl")
UNITS = Path(__file__).with_name("notations_units.jsonl")
BOXES = Path(__file__).with_name("notations_boxes.jsonl")
FORMULAS = Path(__file__).with_name("notations_formulas.jsonl")


def table(kind):
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def talk(reply, answer):
    return [
        {"role": "user", "content": "q", "answer": answer},
        {"role": "assistant", "content": reply},
    ]


def judged(kind, pairs):
    """True, False or None (reference not understood) for pairs of reference and reply."""
    if kind == "boxed":
        return [PARSERS["boxed"](reply) == reference for reference, reply in pairs]
    if kind == "code":
        return [code_of_reply(reply) == reference for reference, reply in pairs]
    values = build({"kind": kind})([talk(reply, reference) for reference, reply in pairs])
    return [None if value is None else value == 1.0 for value in values]


@pytest.mark.parametrize("kind", ["number", "math", "exact_match", "boxed", "code"])
def test_table_of_notations(kind):
    rows = table(kind)
    found = judged(kind, [(row["reference"], row["reply"]) for row in rows])
    verdicts = list(zip(rows, found, strict=True))
    accepted = [row for row, value in verdicts if value and row["right"] is not True]
    rejected = [row for row, value in verdicts if not value and row["right"]]
    unread = [row for row, value in verdicts if (value is None) != (row["right"] is None)]
    assert accepted == []
    assert len(rejected) <= 0.02 * sum(row["right"] is True for row in rows), rejected
    assert unread == []


@pytest.mark.parametrize("path", [MORE, UNITS, BOXES, FORMULAS])
@pytest.mark.parametrize("kind", ["number", "math"])
def test_more_notations(kind, path):
    """Regression rows for the grammar; accuracy is measured on the other table."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == kind]
    found = judged(kind, [(row["reference"], row["reply"]) for row in rows])
    assert [row for row, value in zip(rows, found, strict=True) if value != row["right"]] == []


def test_table_of_notations_is_consistent():
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    assert len(rows) >= 400
    assert sum(row["right"] is False for row in rows) >= 0.5 * len(rows)
    assert sum(row["source"] == "generated" for row in rows) >= 0.2 * len(rows)


# Public datasets


def references(pattern, column):
    root = os.environ.get("RLHF_SHARED_DATA")
    files = sorted(Path(root).glob(pattern)) if root else []
    if not files:
        pytest.skip(f"set RLHF_SHARED_DATA to a folder with {pattern}")
    return [json.loads(line)[column] for file in files for line in gzip.open(file, "rt")]


FIVE = ["The answer is {}.", "#### {}", "<think>1 or 2?</think><answer>{}</answer>",
        "So we get $\\boxed{{{}}}$", "**Answer:** {}"]  # fmt: skip


def altered(text):
    """``text`` with its last digit changed, and with the sign of its first number."""
    last = max(i for i, c in enumerate(text) if c.isdigit())
    yield text[:last] + ("7" if text[last] != "7" else "2") + text[last + 1 :]
    yield text[1:] if text[0] == "-" else "-" + text


@pytest.mark.parametrize(
    ("pattern", "share"), [("math_gsm8k_*.gz", 0.01), ("math_svamp*.gz", 0.01)]
)
def test_number_references_of_public_sets(pattern, share):
    found = Counter(str(reference) for reference in references(pattern, "final"))
    unread = Counter()
    for reference, count in found.items():
        try:
            right = parse_quantity(reference, is_reference=True)
        except NotUnderstood as reason:
            unread[str(reason)] += count
            continue
        for form in FIVE:
            assert right.matches(parse_final_quantity(form.format(reference))), (form, reference)
            for other in altered(reference):
                wrong = parse_final_quantity(form.format(other))
                assert right.value == 0 or not right.matches(wrong), (reference, other)
    print(dict(unread))
    assert unread.total() <= 0.01 * found.total()


@pytest.mark.parametrize("most", [150, pytest.param(10**6, marks=pytest.mark.sweep)])
def test_math_references_of_a_public_set(most):
    found = Counter(references("math_math_train*.gz", "answer"))
    unread, number = Counter(), found.total()
    kept = []
    for reference, count in found.items():
        try:
            parse_reference_answer(reference or "")
        except NotUnderstood as reason:
            unread[str(reason)] += count
        else:
            kept.append(reference)
    print(dict(unread))
    assert unread.total() <= 0.10 * number
    for reference in kept[:: max(1, len(kept) // most)]:
        spelled = reference.strip()
        for form in MATH_FIVE:
            assert answer_verdict_and_reason(reference, form.format(spelled))[0] == "right", (
                form,
                reference,
            )
            for other in altered_math(spelled):
                assert answer_verdict_and_reason(reference, form.format(other))[0] == "wrong", (
                    reference,
                    other,
                )


MATH_FIVE = ["The answer is ${}$.", "\\boxed{{{}}}", "<think>2?</think>So $\\boxed{{{}}}$.",
             "<answer>{}</answer>", "#### ${}$"]  # fmt: skip


def altered_math(text):
    """``text`` with one digit changed; its sign, where it is one value that is not zero."""
    digits = [match.start() for match in re.finditer(r"\d", text)]
    if digits:
        last = digits[-1]
        yield text[:last] + ("7" if text[last] != "7" else "2") + text[last + 1 :]
    if re.fullmatch(r"-?\\?[d]?(?:frac\{\d+\}\{\d+\}|\d[\d.]*)", text) and re.search("[1-9]", text):
        yield text[1:] if text[0] == "-" else "-" + text


# The grammar itself


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1.5 million dollars", 1_500_000, "$"),
        ("-\\$1{,}234.50", Fraction(-2469, 2), "$"),
        ("3 dozen", 36, ""),
        ("12.5%", Fraction(1, 8), ""),
        ("60 km/h", 60, "km/h"),
        ("60 kilometers per hour", 60, "km/h"),
        ("10 square meters", 10, "m^2"),
        ("10 m^2", 10, "m^2"),
        ("5 \\frac{kg m}{s^2}", 5, "kg m/s^2"),
        ("5 s^-2·m·kg", 5, "kg m/s^2"),
        ("5 N m", 5, "N m"),
        ("5 in^3", 5, "in^3"),
        ("5 J/(kg·K)", 5, "J/K/kg"),
        ("60 mph", 60, "mile/h"),
        ("1\\ 234~567", 1234, None),
        ("1\\ 234\\ 567", 1234567, ""),
        ("0,500", 0, None),
        ("0.1\\overline{6}", Fraction(1, 6), ""),
        ("1.234.567,89", Fraction(123456789, 100), ""),
        ("-2^{-3}", Fraction(-1, 8), ""),
    ],
)
def test_read_quantity(text, value, unit):
    if unit is None:
        with pytest.raises(NotUnderstood):
            parse_quantity(text)
        return
    assert parse_quantity(text) == Quantity(Fraction(value), unit)


@given(st.text(alphabet="0123456789.,-+−–/^{}()[]$%\\ eEx=or not frac\n<>#*_½²", max_size=120))
@settings(max_examples=300, deadline=None)
def test_parsers_accept_any_text(text):
    for read in (parse_quantity, parse_final_quantity):
        with suppress(NotUnderstood):
            assert isinstance(read(text), Quantity)
    assert answer_verdict_and_reason("5", text, 2.0)[0] in ("right", "wrong")


@given(st.fractions(max_denominator=999), st.integers(-6, 6))
@settings(max_examples=200, deadline=None)
def test_numbers_read_as_python_writes_them(fraction, power):
    assert parse_quantity(str(fraction)).value == fraction
    value = fraction * Fraction(10) ** power
    assert parse_quantity(f"{value.numerator}/{value.denominator}").value == value
    whole = fraction.numerator
    assert parse_quantity(f"{whole:,}").value == whole
    assert parse_quantity(f"{whole}e{power}").value == whole * Fraction(10) ** power


def test_a_long_list_of_groups_of_digits_is_a_list_of_numbers():
    numbers = [str(number) for number in range(100, 1000)]
    tokens = tokens_of(",".join([*numbers, "12"]))
    assert [token.text for token in tokens if token.kind == "number"] == [*numbers, "12"]
    assert tokens_of("1e" + "0" * 19_000 + "6")[0].value == 10**6


UNIT_EXPONENTS = st.dictionaries(
    st.sampled_from(["m", "s", "kg", "km", "ft", "J"]),
    st.integers(-3, 3).filter(bool),
    min_size=1,
    max_size=4,
)


@given(UNIT_EXPONENTS, UNIT_EXPONENTS, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_units_are_equal_if_the_exponents_of_their_factors_are(first, second, rng):
    def spelled(exponents):
        factors = [f"{unit}^{power}" for unit, power in exponents.items()]
        rng.shuffle(factors)
        return f"5 {rng.choice([' ', '*', '·']).join(factors)}"

    a = parse_quantity(spelled(first))
    assert a == parse_quantity(spelled(first))
    assert (a == parse_quantity(spelled(second))) == (first == second)
