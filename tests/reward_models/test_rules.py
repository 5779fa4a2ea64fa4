import gzip
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward_models import build
from rlhf.reward_models.notation.lexer import NotUnderstood
from rlhf.reward_models.notation.quantity import parse_final_quantity
from rlhf.reward_models.sentiment import read_lexicon, sentiment_score
from rlhf.reward_models.worker import FunctionWorker


def talk(reply: str, **facts: str):
    return [{"role": "user", "content": "q", **facts}, {"role": "assistant", "content": reply}]


def score(spec, *replies, **facts):
    return build(spec)([talk(reply, **facts) for reply in replies])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("It costs $1,234.50", "1234.50"),
        ("#### 42", "42"),
        ("#### 42\nwhich is 6*7 of the 9", "42"),
        ("#### 41 no\n#### 42", "42"),
        ("the answer is -3", "-3"),
        ("it is 12,000,000!", "12000000"),
        ("10-3", None),  # an expression, or a range
        ("between 5 and .5", None),
        ("from 2019-2021", None),
        ("I have 2 dogs, 3 cats.\n#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    if number is None:
        with pytest.raises(NotUnderstood):
            parse_final_quantity(text)
    else:
        assert parse_final_quantity(text).value == Fraction(number)


@pytest.mark.parametrize("separator", [" ", "\n"])
def test_a_long_reply_has_a_final_number(separator):
    sentences = [*["We halve the rest again."] * 300, "The answer is 42."]
    assert parse_final_quantity(separator.join(sentences)).value == 42
    with pytest.raises(NotUnderstood):  # a formula is not cut
        parse_final_quantity(rf"\boxed{{{'1 + ' * 2000}42}}")


@given(st.text(max_size=200))
def test_rules_accept_any_text(text):
    assert score({"kind": "number", "answer": "5.5"}, text) in ([0.0], [1.0])
    specs = [{"kind": k} for k in ("refusal", "repetition", "lexicon", "format")]
    values = build([*specs, {"kind": "length", "low": 3, "high": 9}]).score([talk(text)]).components
    assert all(-1 <= column[0] <= 1 for column in values.values())


def test_number_compares_values_not_spelling():
    spec = {"kind": "number"}
    assert score(spec, "42.0", "it is $42", "43", "none", answer="#### 42") == [1, 1, 0, 0]
    assert score(spec | {"tolerance": 0.5}, "42.5", "42.6", answer="42") == [1, 0]
    scores = build(spec).score([talk("42"), talk("42", answer="none")])
    assert scores.values == [None, None]
    assert scores.counts == {
        "number: no reference answer": 1,
        "number: the reference answer cannot be parsed: no number": 1,
    }


@pytest.mark.parametrize("kind", ["number", "math"])
@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("5 m^2", "5 meters squared", 1),
        ("5 meters squared", "The area is 5 square meters.", 1),
        ("5 meters squared", r"\boxed{5\text{ m}^2}", 1),
        ("5 cm^3", "5 centimeters cubed", 1),
        ("5", "5 meters squared", 1),
        ("25", "5 meters squared", 0),
        ("5 m", "5 meters squared", 0),
        ("25", "5 squared", 0),
        ("5 m/s^2", "5 meters per second squared", 1),
        ("5 m/s", "5 meters per second squared", 0),
        (r"100^\circ C", "100 degrees Celsius", 1),
        (r"100^\circ\text{C}", r"100^\circ\text{F}", 0),
        (r"100^\circ\text{C}", "100", 1),
        ("100 degrees", "100 degrees Celsius", 0),
        ("14", r"\boxed{14!}", 0),
        ("14", r"<answer>\boxed{14!}</answer>", 0),
        ("14", r"It is 4.</think>\boxed{14!}", 0),
        ("14", r"<answer>\boxed{14}</answer>", 1),
        ("14", r"The answer is \boxed{14}!", 1),
        ("5", r"\boxed{5} squared", 0),
        ("5", r"\boxed{5} minus 2", 0),
        ("5", r"\boxed{5} meters squared", 1),
    ],
)
def test_words_after_a_number_are_its_unit_or_change_it(kind, answer, reply, right):
    assert score({"kind": kind, "answer": answer}, reply) == [right]


def test_minus_plus_has_the_opposite_sign_of_plus_minus():
    """1 ± 2 ∓ 3 is 1 + 2 - 3 or 1 - 2 + 3."""
    for reference in (r"1 \pm 2 \mp 3", r"1 \mp 2 \pm 3"):
        replies = [r"\boxed{0, 2}", r"\boxed{6, -4}", r"\boxed{1 \mp 2 \pm 3}"]
        assert score({"kind": "math", "answer": reference}, *replies) == [1, 0, 1]


def test_a_dash_after_a_word_is_no_sign():
    replies = ["Answer – 8", "Total - 8", "It is - 8", "x = - 8", "Answer: -8"]
    assert score({"kind": "number", "answer": "-8"}, *replies) == [0, 0, 1, 1, 1]
    assert score({"kind": "math", "answer": "-8"}, *replies) == [0, 0, 1, 1, 1]
    assert score({"kind": "number", "answer": "8"}, *replies) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["number", "math"])
def test_check_marks_are_no_symbols(kind):
    spec = {"kind": kind, "answer": "8"}
    assert score(spec, "8 ✓", "✅ 8", "3+5=8 ✔\ufe0f", "8 ✗", "9 ✓") == [1, 1, 1, 0, 0]


def test_a_time_of_day_is_no_number():
    assert score({"kind": "number", "answer": "12 noon"}, "12") == [None]


def test_the_letter_of_a_choice_may_follow_the_answer_is():
    replies = ["The answer is A.", "Answer: a", "The answer is (A)."]
    assert score({"kind": "math", "answer": "A"}, *replies) == [1, 1, 1]
    wrong = ["The answer is B.", "The answer is A or B.", "The answer is not A.", "A and B"]
    assert score({"kind": "math", "answer": "A"}, *wrong) == [0, 0, 0, 0]


def test_answers_from_a_file(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "q", "answer": 5}\n{"prompt": "other", "answer": 6}\n')
    spec = {"kind": "number", "answers": str(file)}
    assert score(spec, "5", "6") == [1, 0]
    unknown = [{"role": "user", "content": "new"}, *talk("5")[1:]]
    assert build(spec)([unknown]) == [None]
    file.write_text('{"prompt": "q", "answer": 5}\n{"prompt": "q", "answer": 6}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl:2 has a prompt that an earlier row"):
        build(spec)
    file.write_text('{"prompt": "q"}\n')
    with pytest.raises(
        ValueError, match=r"answers.jsonl:1 must have the keys 'prompt' and 'answer'"
    ):
        build(spec)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build({"kind": "number", "answers": str(tmp_path / "missing")})
    with pytest.raises(ValueError, match="not both"):
        build({"kind": "number", "answers": str(file), "answer": "3"})


@pytest.mark.parametrize("kind", ["exact_match", "number", "math"])
@pytest.mark.parametrize("answer", [42, 42.0, "42", ["41", "42"], [41, 42]])
def test_answers_are_numbers_and_lists_too(kind, answer):
    asked = {"role": "user", "content": "6*7?"}
    for spec, first in (({"kind": kind}, {**asked, "answer": answer}),
                        ({"kind": kind, "answer": answer}, asked)):  # fmt: skip
        talks = [[first, {"role": "assistant", "content": reply}] for reply in ("42", "43")]
        assert build(spec)(talks) == [1.0, 0.0]


def test_answers_that_cannot_be_used_are_counted():
    for kind in ("exact_match", "number", "math"):
        scores = build({"kind": kind}).score([talk("42", answer={"a": 1}), talk("4", answer=[])])
        assert scores.values == [None, None]
        assert scores.counts == {
            f"{kind}: a reference answer is a dict, not a text or a number": 1,
            f"{kind}: no reference answer": 1,
        }


@pytest.mark.parametrize("answer", [None, "", " \n", float("nan"), [""], ["5", None]])
@pytest.mark.parametrize("kind", ["exact_match", "number", "math"])
def test_blank_answers_are_no_answers(kind, answer):
    scores = build({"kind": kind}).score([talk(reply, answer=answer) for reply in ("", "nan", "5")])
    assert scores.values == [None] * 3
    assert scores.counts == {f"{kind}: no reference answer": 3}


def test_a_list_with_an_answer_that_is_not_understood():
    """A reply that equals another reference is right; otherwise it has no score."""
    scores = build({"kind": "number", "answer": ["7", "3:30"]}).score([talk("7"), talk("8")])
    assert scores.values == [1.0, None]


def test_a_reply_may_be_missing_or_in_parts():
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    reward = build({"kind": "number", "answer": 42})
    talks = [[{"role": "assistant", "content": content}] for content in (parts, None, "42")]
    assert reward(talks) == [1.0, 0.0, 1.0]


def test_hostile_replies_are_wrong_and_the_next_one_is_scored():
    reward = build({"kind": "math", "answer": "5", "timeout": 2.0})
    hostile = [
        "10^10^10",
        "(" * 5000 + "5",
        "9!" * 50 + "!",
        "(x+y+z+1)^{900} - (x+y+z+1)^{900} + 5",
    ]
    scores = reward.score([talk(reply) for reply in [*hostile, "5"]])
    assert scores.values[-1] == 1.0
    assert scores.values[:3] == [0.0, 0.0, 0.0]


def test_exact_match():
    spec = {"kind": "exact_match", "answer": "Paris"}
    assert score(spec, "<think>Rome?</think>\n\nParis", "Rome?\n</think>\nParis") == [1, 1]
    assert score(spec, "<think>Paris</think>Rome", "<think>Paris", "Paris</think>") == [0, 0, 0]
    assert score({**spec, "answer": "</think>"}, "</think>") == [1]
    assert score({"kind": "exact_match", "answer": "Paris"}, " paris\n", "Paris.") == [1, 0]
    assert score({"kind": "exact_match", "answer": "Paris", "ignore_case": False}, "paris") == [0]


def test_a_pattern_has_a_deadline():
    reward = build({"kind": "regex", "pattern": "(a|aa|a?)*b$", "timeout": 0.05})
    scores = reward.score([talk("a" * 5000 + "c"), talk("aab")])
    assert scores.values in ([None, 1.0], [0.0, 1.0])
    late = {"regex: the pattern search takes more than 0.05 s": 1}
    assert scores.unscored == 0 or scores.counts == late


def test_regex():
    assert score({"kind": "regex", "pattern": "a.b"}, "xa\nbx", "ab") == [1, 0]
    assert score({"kind": "regex", "pattern": "a+", "full": True}, "aaa", "aab") == [1, 0]
    assert score({"kind": "regex", "pattern": "A", "ignore_case": True}, "a") == [1]


def test_format():
    good = "<think>a\nb</think>\n<answer>c</answer>"
    bad = ["x" + good, good + good, "<answer>c</answer><think>a</think>", "<think>a</think>", ""]
    assert score({"kind": "format"}, good, *bad) == [1, 0, 0, 0, 0, 0]
    assert score({"kind": "format", "names": ["sql"]}, "<sql>x</sql>", "x") == [1, 0]


def test_length():
    spec = {"kind": "length", "low": 2, "high": 4}
    replies = ["", "a", "a b", "a b c d", "a b c d e", "a " * 8, "a " * 99]
    assert score(spec, *replies) == [-1, -0.5, 0, 0, -0.25, -1, -1]
    assert score({"kind": "length", "high": 2, "unit": "characters"}, "ab", "abc") == [0, -0.5]
    with pytest.raises(ValueError, match="unit must be"):
        build({"kind": "length", "unit": "tokens"})
    with pytest.raises(ValueError, match="0 <= low <= high"):
        build({"kind": "length", "low": 5, "high": 4})


def test_repetition():
    spec = {"kind": "repetition", "n": 2}
    assert score(spec, "a b c d", "a b a b a b", "a", "") == [0, 2 / 5 - 1, 0, 0]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("I cannot assist with this request.", 1),
        ("As an AI, I have no opinion.", 1),
        ("I am unable to provide that.", 1),
        ("I won’t do that.", 1),
        ("Sure! Here is how.", 0),
        ("You can't go wrong with pasta.", 0),
        ("A story: she was sorry.", 0),
    ],
)
def test_refusal(reply, expected):
    assert score({"kind": "refusal"}, reply) == [expected]


def test_lexicon_order_of_sentences():
    words = read_lexicon()
    ordered = [
        "I hated this awful, boring mess.",
        "It is bad.",
        "It is slightly bad.",
        "It is a table.",
        "It is not bad.",
        "It is good.",
        "It is very good.",
        "I loved this wonderful, brilliant film.",
    ]
    values = [sentiment_score(text, words) for text in ordered]
    assert values == sorted(values)
    assert values[3] == 0.0
    assert sentiment_score("This isn't a good film", words) < 0
    assert abs(sentiment_score("great " * 1000, words)) < 1


def test_lexicon_of_your_own(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# mine\nzork 2\n\nfrob -1\n")
    assert score({"kind": "lexicon", "path": str(file)}, "zork", "frob", "good") == [0.5, -1 / 3, 0]
    bad = tmp_path / "bad.txt"
    bad.write_text("zork\n")
    with pytest.raises(ValueError, match=r"bad.txt:1 must have the form 'word value'"):
        build({"kind": "lexicon", "path": str(bad)})


def test_vader():
    pytest.importorskip("vaderSentiment")
    good, bad = score({"kind": "vader"}, "I love it!", "I hate it!")
    assert bad < 0 < good


def test_math():
    replies = [r"so $\boxed{\frac{1}{2}}$", "0.5", "$1/3$", "dunno"]
    reward = build({"kind": "math"})
    talks = [talk(reply, answer=r"\frac{1}{2}") for reply in replies]
    assert reward(talks) == [1, 1, 0, 0]
    with ThreadPoolExecutor(4) as threads:  # where signal-based timeouts give zeros or hang
        assert list(threads.map(lambda t: reward([t])[0], talks)) == [1, 1, 0, 0]


@pytest.fixture
def slow_module(tmp_path, monkeypatch):
    (tmp_path / "slow_functions.py").write_text(
        "import os, time\n"
        "def act(what):\n"
        "    print('noise on stdout')\n"
        "    if what == 'sleep': time.sleep(60)\n"
        "    if what == 'die': os._exit(3)\n"
        "    if what == 'raise': raise KeyError('x')\n"
        "    return what.upper()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "slow_functions:act"


def test_worker_recovers_from_hangs_and_crashes(slow_module):
    from rlhf.reward_models.core import Unscorable

    worker = FunctionWorker(slow_module, timeout=3.0)
    assert worker("a") == "A"
    for what, reason in [("sleep", "took longer than 3 s"), ("die", "died"), ("raise", "KeyError")]:
        with pytest.raises(Unscorable, match=reason):
            worker(what)
        assert worker("b") == "B"
    worker.close()


def test_a_missing_module_is_named():
    with pytest.raises(ValueError, match=r"cannot load no_such_module:f"):
        FunctionWorker("no_such_module:f", timeout=5.0)("x")


def gsm8k_rows():
    root = os.environ.get("RLHF_SHARED_DATA")
    files = sorted(Path(root).glob("math_gsm8k_*.jsonl.gz")) if root else []
    return [json.loads(line) for file in files for line in gzip.open(file, "rt")]


def test_gsm8k_solutions_are_right_and_changed_ones_wrong():
    rows = gsm8k_rows()
    if not rows:
        pytest.skip("set RLHF_SHARED_DATA to a folder with math_gsm8k_*.jsonl.gz")
    rng = random.Random(0)
    reward = build({"kind": "number"})
    right, wrong = [], []
    for row in rows:
        answer = Decimal(re.sub(r"[,$]", "", str(row["final"])))
        right.append(talk(row["answer"], answer=str(row["final"])))
        changed = answer + rng.choice([-10, -1, 1, 7, 100])
        solution = row["answer"].rpartition("####")[0] + f"#### {changed}"
        wrong.append(talk(solution, answer=str(row["final"])))
    assert len(rows) == 8792
    assert set(reward(right)) == {1.0}
    assert set(reward(wrong)) == {0.0}
    spoken = [
        talk(f"So the answer is {c[0]['answer']}.", **{"answer": c[0]["answer"]}) for c in right
    ]
    assert set(reward(spoken)) == {1.0}
