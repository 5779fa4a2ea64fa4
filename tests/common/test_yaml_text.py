"""YAML is read with limits, and what is written is read back as the same data."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf.common.yaml_text import dump_yaml, load_yaml

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NAMES = st.text(max_size=8)
TREES = st.recursive(LEAVES, lambda t: st.lists(t) | st.dictionaries(NAMES, t), max_leaves=12)


@given(TREES)
def test_plain_data_is_read_back(tree):
    assert load_yaml(dump_yaml(tree)) == tree


@pytest.mark.parametrize(
    "text", ["1e-5", "1E5", "2024-01-01", "no", "1:30", "010", "=", "😀", "a\u2028b"]
)
def test_text_stays_text(text):
    assert load_yaml(dump_yaml([text, {text: 1}])) == [text, {text: 1}]


def test_dates_are_text_and_aliases_are_read():
    assert load_yaml("a: 2024-01-01\nb: &x [1]\nc: *x") == {"a": "2024-01-01", "b": [1], "c": [1]}


@pytest.mark.parametrize("text", ["1:30", "1:30.5", "-12:30:00", "010", "-07", "00", "08", "0o10"])
def test_times_and_numbers_with_a_leading_zero_are_text(text):
    """YAML 1.1 reads 1:30 as 90 and 010 as 8."""
    assert load_yaml(f"[{text}]") == [text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("+5", 5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0b11", 3),
        ("0.5", 0.5),
        ("-1.", -1.0),
        (".5", 0.5),
        ("1_0.5", 10.5),
        ("1.5e+3", 1500.0),
        ("00.5", 0.5),
        ("-.inf", float("-inf")),
    ],
)
def test_other_numbers_are_numbers(text, value):
    (number,) = load_yaml(f"[{text}]")
    assert number == value
    assert type(number) is type(value)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("a: 1\nb: {c: 1, d: 2}\na: 3", "the key 'a' is repeated", 3),
        ("a:\n  b: 1\n  b: 2", "the key 'b' is repeated", 3),
        (BOMB, "more than 100,000 values with aliases expanded", 5),
        ("a: &a [*a, *a]", "more than 50 nested mappings and lists", 1),
        ("[" * 60 + "]" * 60, "more than 50 nested mappings and lists", 1),
        ("a: !!set {b}", "could not determine a constructor", 1),
        ("a: !!python/object:os.system x", "could not determine a constructor", 1),
        ('a: "\\ud800"', "a lone surrogate is not a character", 1),
    ],
)
def test_text_beyond_the_limits_is_refused_with_its_line(text, problem, line):
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        load_yaml(text)
    assert problem in str(caught.value)
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == line - 1


@pytest.mark.parametrize("text", ["[" * 20_000, "1" * 5000])
def test_text_that_python_cannot_read_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
