"""The report finds each known fault, lists its rows, and has no findings on clean data."""

import json
import random

import numpy as np
import pytest

from rlhf.common.files import write_jsonl
from rlhf.data import DataSpec
from rlhf.data.data_report import check_dataset, make_data_report
from rlhf.data.leakage import indices_of_shared_prompts, indices_with_shared_prompt_ngrams
from rlhf.data.load import LoadedRows
from rlhf.data.preferences import inject_label_noise
from rlhf.data.suspects import CrossFittedMargins, cross_fitted_margins
from rlhf.errors import UserError

GOOD, BAD = ["kind", "clear", "helpful", "exact"], ["rude", "vague", "wrong", "lazy"]
NEUTRAL = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def pair(prompt, chosen, rejected):
    return {"prompt": user(prompt), "chosen": assistant(chosen), "rejected": assistant(rejected)}


def clean_pairs(n=300, seed=0):
    """Pairs of equal length in words and letters, told apart by one word."""
    rng = random.Random(seed)

    def reply(word):
        return " ".join([*rng.choices(NEUTRAL, k=6), word.ljust(7, ".")])

    rows = []
    for i in range(n):
        replies = [reply(rng.choice(GOOD)), reply(rng.choice(BAD))]
        rows.append(pair(f"Question number {i}?", *replies))
    return rows


def loaded(rows, dropped=None):
    return LoadedRows(
        rows=rows, dropped=dropped or {}, total=len(rows) + sum((dropped or {}).values())
    )


def finding(report, name):
    (found,) = [f for f in report.findings if f.name == name]
    return found


def words(text):
    return len(text.split())


def test_silent_on_clean_pairs():
    report = make_data_report(
        loaded(clean_pairs()),
        against=loaded([pair("Something else?", "a", "b")]),
        count_tokens=words,
        max_length=100,
    )
    assert {f.name: f.level for f in report.findings if f.level != "ok"} == {}
    assert report.ok
    assert report.verdict() == "no fault found in 300 rows"
    assert len(report.findings) == 10


PLANTED = pair("Is it?", "Yes", "No")


@pytest.mark.parametrize(
    ("planted", "name", "rows"),
    [
        ([PLANTED, pair("is  IT?", "yes", "no")] * 3, "duplicates", (301, 302, 303, 304, 305)),
        ([PLANTED, pair("Is it?", "No", "Yes")], "contradictory pairs", (300, 301)),
        ([pair("Is it?", "Yes", "yes ")], "near ties", (300,)),
        (
            [
                {**pair("Is it?", "Yes", "No"), "margin": -2.0},
                {**pair("Or not?", "Yes", "No"), "margin": 2.0},
            ],
            "reversed scores",
            (300,),
        ),
        ([pair("Is it?", "x " * 99, "No")] * 4, "over-long rows", (300, 301, 302, 303)),
        ([pair("Elsewhere?", "Yes", "No")], "shared prompts", (300,)),
    ],
)
def test_planted_faults_in_pairs(planted, name, rows):
    report = make_data_report(
        loaded(clean_pairs() + planted),
        against=loaded([pair("elsewhere? ", "a", "b")]),
        count_tokens=words,
        max_length=100,
    )
    found = finding(report, name)
    assert (found.level, found.rows, found.count) == ("fault", rows, len(rows))
    assert f"{name} ({len(rows)})" in report.verdict()
    assert not report.ok
    assert found.examples[0].startswith("user: ")


def test_same_reply_to_different_prompts_is_no_duplicate():
    rows = [pair("a", "yes", "no"), pair("b", "yes", "no"), pair("c", "no", "yes")]
    report = make_data_report(loaded(rows))
    assert finding(report, "duplicates").count == 0
    assert finding(report, "contradictory pairs").count == 0


def call(city):
    function = {"name": "weather", "arguments": {"city": city}}
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]


def thought(reasoning):
    return [{"role": "assistant", "content": "4", "reasoning_content": reasoning}]


def with_system(text):
    return [{"role": "system", "content": text}, *user("Hi")]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": user("Rain?"), "completion": call(city)} for city in ("Oslo", "Rome")],
        [{"prompt": user("2+2?"), "completion": thought(text)} for text in ("two", "count")],
        [
            {"prompt": with_system(text), "completion": assistant("Hi")}
            for text in ("Be kind", "Be rude")
        ],
        [
            {"prompt": user("Q"), "completion": assistant("R"), "tools": [{"name": name}]}
            for name in "ab"
        ],
        [{"prompt": user("Q"), "replies": [assistant(a), assistant("z")]} for a in "xy"],
        [{"prompt": user("Q"), "steps": ["1", step], "labels": [1, 0]} for step in "23"],
        [
            {"prompt": user("Rain?"), "chosen": call("Oslo"), "rejected": call("Rome")},
            {"prompt": user("2+2?"), "chosen": thought("two"), "rejected": thought("count")},
        ],
        [
            {
                "prompt": with_system("formal"),
                "chosen": assistant("Sir"),
                "rejected": assistant("Yo"),
            },
            {
                "prompt": with_system("casual"),
                "chosen": assistant("Yo"),
                "rejected": assistant("Sir"),
            },
        ],
    ],
)
def test_rows_that_differ_outside_the_text_are_neither_repeated_nor_contradictory(rows):
    names = ("duplicates", "contradictory pairs", "near ties")
    found = [f for f in make_data_report(loaded(rows)).findings if f.name in names]
    assert found
    assert all(f.count == 0 for f in found)
    twice = make_data_report(loaded([*rows, rows[0]]))
    assert finding(twice, "duplicates").rows == (len(rows),)


def test_one_prompt_with_two_answers_is_contradictory_and_not_repeated():
    prompts = [("2+2?", "4"), ("2+2?", "5"), ("3+3?", "6"), ("3+3?", "6")]
    rows = [{"prompt": [{"role": "user", "content": q, "answer": a}]} for q, a in prompts]
    report = make_data_report(loaded(rows))
    assert finding(report, "contradictory answers").rows == (0, 1)
    assert finding(report, "duplicates").rows == (3,)
    assert not report.ok
    without = [rows[2], {"prompt": [{"role": "user", "content": "3+3?"}]}]
    assert finding(make_data_report(loaded(without)), "contradictory answers").count == 0
    pairs = [row | {"chosen": assistant("4"), "rejected": assistant("5")} for row in rows[:1]]
    swapped = [pairs[0] | {"chosen": assistant("5"), "rejected": assistant("4")}]
    assert finding(make_data_report(loaded(pairs + swapped)), "contradictory pairs").rows == (0, 1)


def test_dropped_rows_are_noted_and_faulted_when_many():
    few = finding(make_data_report(loaded(clean_pairs(), {"empty reply": 3})), "unusable rows")
    many = finding(make_data_report(loaded(clean_pairs(), {"empty reply": 30})), "unusable rows")
    assert (few.level, many.level) == ("note", "fault")
    assert many.verdict == "30 of 330 rows cannot be used: 30 empty reply"


def test_rows_of_weight_zero_are_noted():
    dropped = {"row of weight 0": 100, "every reply has weight 0": 50}
    found = finding(make_data_report(loaded(clean_pairs(), dropped)), "unusable rows")
    assert (found.level, found.count) == ("note", 150)
    dropped["empty reply"] = 30
    found = finding(make_data_report(loaded(clean_pairs(), dropped)), "unusable rows")
    assert (found.level, found.count) == ("fault", 180)


@pytest.mark.parametrize(("share", "level"), [(0.5, "ok"), (0.58, "note"), (0.75, "fault")])
def test_length_bias(share, level):
    rows = [pair(f"p{i}", "x" * 9, "x" * (4 if i < 400 * share else 14)) for i in range(400)]
    found = finding(make_data_report(loaded(rows)), "length bias")
    assert found.level == level
    assert f"chosen in {share:.1%} of pairs" in found.verdict


def test_length_bias_without_any_difference():
    found = finding(make_data_report(loaded([pair("p", "a", "b")])), "length bias")
    assert (found.level, found.total) == ("ok", 0)


def test_labels():
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    assert make_data_report(loaded(rows)).ok
    planted = [*rows, {"text": "TEXT 4", "label": 1}]
    found = finding(make_data_report(loaded(planted)), "contradictory labels")
    assert (found.level, found.rows) == ("fault", (4, 40))
    for positive, level in [(40, "fault"), (39, "note"), (30, "ok")]:
        skewed = [row | {"label": int(i < positive)} for i, row in enumerate(rows)]
        assert finding(make_data_report(loaded(skewed)), "label balance").level == level


def test_a_prompt_that_fills_the_length_is_named():
    rows = [pair("w " * 10, "a", "b"), pair("w " * 8, "a b", "c"), pair("w " * 8, "a b c", "c")]
    found = finding(
        make_data_report(loaded(rows), count_tokens=words, max_length=10), "over-long rows"
    )
    assert found.rows == (0, 2)
    assert found.verdict.endswith("exceed max_length = 10 tokens, 1 by the prompt alone")


@pytest.mark.parametrize(
    ("short", "long", "field", "maximum"),
    [
        ({"replies": ["a", "b"]}, {"replies": ["a", "b c d e"]}, "replies", 4),
        ({"steps": ["a", "b"]}, {"steps": ["a b", "c d"]}, "steps", 2),
    ],
)
def test_rankings_and_solutions_have_lengths(short, long, field, maximum):
    rows = [
        {"prompt": user("w w"), **row} | ({"labels": [1, 0]} if field == "steps" else {})
        for row in (short, long)
    ]
    if field == "replies":
        rows = [row | {"replies": [assistant(text) for text in row["replies"]]} for row in rows]
    report = make_data_report(loaded(rows), count_tokens=words, max_length=5)
    assert finding(report, "over-long rows").rows == (1,)
    assert report.lengths[f"{field}, tokens"]["max"] == maximum


def test_lengths_are_in_characters_and_tokens():
    rows = [{"text": "a b c"}, {"text": "a"}, {"text": "a b"}]
    lengths = make_data_report(loaded(rows), count_tokens=words).lengths
    assert lengths["text, characters"] == {"median": 3.0, "p95": pytest.approx(4.8), "max": 5.0}
    assert lengths["text, tokens"]["median"] == 2.0


def test_output_is_plain_json_and_a_page():
    report = make_data_report(loaded([PLANTED, PLANTED]))
    page = report.to_markdown()
    assert page.startswith("**1 fault in 2 rows: duplicates (1).**")
    assert (
        "- fault: duplicates: 1 of 2 rows (50.0%) repeat an earlier row\n  - `user: Is it?`" in page
    )
    assert "| chosen, characters | 3 | 3 | 3 |" in page
    assert json.loads(json.dumps(report.to_dict()))["findings"][1]["rows"] == [1]


def test_report_rejects_empty_data_and_max_length_without_tokenizer():
    with pytest.raises(UserError, match="no rows"):
        make_data_report(loaded([]))
    with pytest.raises(UserError, match="give count_tokens"):
        make_data_report(loaded([PLANTED]), max_length=9)


@pytest.mark.parametrize("kind", ["sft", "label", "prompt", "text"])
def test_every_kind_can_be_examined_from_a_file(tmp_path, kind):
    rows = [
        {"prompt": f"p{i}", "completion": "c", "label": i % 2, "text": f"t{i}"} for i in range(9)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    spec = DataSpec(str(tmp_path / "a.jsonl"))
    report = check_dataset(spec, kind, against=spec, count_tokens=words, max_length=9)
    assert report.verdict() == "1 fault in 9 rows: shared prompts (9)"


# Leakage


def test_overlap_needs_thirteen_words_in_a_row():
    run = [f"w{i}" for i in range(14)]
    known = [{"prompt": user("start " + " ".join(run) + " end")}]
    asked = [
        {"prompt": user("other " + " ".join(run[:13]) + " words")},
        {"prompt": user("other " + " ".join(run[:12]) + " words")},
        {"prompt": user(", ".join(run[1:]).upper() + "!")},
        {"prompt": user(" ".join([*run[:7], "break", *run[7:]]))},
        {"prompt": user("short")},
    ]
    assert indices_with_shared_prompt_ngrams(asked, known) == [0, 2]
    assert (
        indices_with_shared_prompt_ngrams(known, [{"prompt": user("user " + " ".join(run[:12]))}])
        == []
    )


def test_a_common_system_message_is_no_overlap():
    system = {"role": "system", "content": " ".join(f"w{i}" for i in range(20))}
    one, two = ({"prompt": [system, *user(text)]} for text in ("a", "b"))
    assert indices_with_shared_prompt_ngrams([one], [two]) == []


def test_shared_prompts_ignore_case_and_space():
    assert indices_of_shared_prompts([{"text": "A  b"}, {"text": "c"}], [{"text": "a B"}]) == [0]


# Suspects


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flipped_pairs_are_the_suspects(seed):
    rows = inject_label_noise(clean_pairs(seed=seed), 0.1, seed=seed)
    margins = cross_fitted_margins(rows, seed=seed)
    flipped = {i for i, row in enumerate(rows) if row["flipped"]}
    assert len(flipped & set(margins.suspects(30))) >= 28
    assert margins.accuracy == pytest.approx(0.9, abs=0.02)


def test_random_labels_give_no_suspects():
    rng = random.Random(3)
    rows = [pair(f"p{i}", *rng.sample(["x y", "y z", "z x"], 2)) for i in range(400)]
    margins = cross_fitted_margins(rows, seed=0)
    assert margins.accuracy == pytest.approx(0.5, abs=0.08)
    assert finding(make_data_report(loaded(rows)), "suspects").level == "ok"


def test_margins_are_equal_after_swapping_every_pair():
    """If all labels are swapped, every pair agrees with the others as before."""
    rows = clean_pairs(120)
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    np.testing.assert_allclose(
        cross_fitted_margins(rows, seed=0).margin,
        cross_fitted_margins(swapped, seed=0).margin,
        atol=1e-6,
    )


def test_margin_does_not_depend_on_the_pair_itself():
    """A word that occurs with one prompt only does not change the margins of that prompt."""
    rows = clean_pairs(100)
    rows += [pair("Repeated?", "unheard", "unseen") for _ in range(20)]
    assert cross_fitted_margins(rows, seed=0).margin[100:] == pytest.approx(0.0)


def test_suspects_are_sorted_and_contradicted():
    margins = CrossFittedMargins(np.array([0.5, -2.0, -0.1, 0.0, -3.0]))
    assert margins.suspects(10) == [4, 1, 2]
    assert margins.suspects(2) == [4, 1]
    assert margins.accuracy == pytest.approx(0.3)
