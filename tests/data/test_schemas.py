"""Layouts, columns, roles and mappings of rows of any kind."""

import json

import pytest

from rlhf.data import DataSpec, load
from rlhf.data.reader import guess_kind
from rlhf.errors import UserError
from tests.helpers.rows import (
    NECTAR,
    PKU,
    assistant,
    bare,
    oasst_rows,
    pair,
    sft,
    system,
    tool,
    user,
)


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("sft", {"prompt": "Q", "completion": "R", "quality": 3}, "columns not used: quality"),
        (
            "sft",
            {"messages": [user("Q"), assistant("R", mood="glad")]},
            "ignored: message key 'mood' in 1 row",
        ),
        (
            "sft",
            {"messages": [user("Q"), assistant("R")], "context": "C"},
            "ignored: context column in 1 row",
        ),
        (
            "sft",
            {"messages": [system("own"), user("Q"), assistant("R")], "system": "other"},
            "ignored: system column that differs from the prompt's system message in 1 row",
        ),
        ("sft", {"text": "T", "system": "S"}, "ignored: system column in 1 row"),
        (
            "sft",
            {"messages": [user("Q", reasoning="x"), assistant("R")]},
            "ignored: reasoning of a user message in 1 row",
        ),
        (
            "sft",
            {"messages": [user("Q", weight=1), assistant("R")]},
            "ignored: weight of a user message in 1 row",
        ),
        (
            "sft",
            {"messages": [user("Q"), assistant("R"), user("unanswered")]},
            "ignored: turns after the last reply in 1 row",
        ),
        (
            "preference",
            {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "big"},
            "ignored: margin is not a number in 1 row",
        ),
        ("prompt", {"turns": ["Q", "more"]}, "ignored: turns after the first in 1 row"),
    ],
)
def test_unused_columns_and_keys_are_reported(read, kind, row, told):
    loaded = read([row], kind)
    assert len(loaded.rows) == 1
    assert loaded.summary() == f"1 of 1 rows; {told}"


def test_columns_of_another_layout_are_reported_though_other_rows_use_them(read):
    chat = {"messages": [user("Q"), assistant("R")]}
    split = {"prompt": "P", "completion": "C"}
    summary = read([split, chat, chat | split, chat | {"prompt": ""}], "sft").summary()
    assert summary == "4 of 4 rows; ignored: completion column in 1 row, prompt column in 1 row"


ROLES = [
    ([user("a"), user("b"), assistant("c")], "consecutive turns with the same role"),
    ([user("a"), assistant("b"), assistant("c")], "consecutive turns with the same role"),
    ([user("a"), assistant("b"), system("c"), user("d"), assistant("e")], "system message after"),
    ([assistant("a"), user("b"), assistant("c")], "first turn is not a user turn"),
    ([user("a"), tool("b"), assistant("c")], "tool result without a call"),
    (
        [user("a"), assistant("b"), user("c"), user("d"), assistant("e")],
        "consecutive turns with the same role",
    ),
]


@pytest.mark.parametrize(("turns", "reason"), ROLES)
@pytest.mark.parametrize(
    "layout", ["messages", "split", "chosen", "prompt+chosen", "label", "prompt", "ranking"]
)
def test_roles_are_checked_in_every_layout(read, layout, turns, reason):
    def rows(turns):
        *before, last = turns
        other = [*before, {**last, "content": "other"}]
        return {
            "messages": ("sft", {"messages": turns}),
            "split": ("sft", {"prompt": before, "completion": [last]}),
            "chosen": ("preference", {"chosen": turns, "rejected": other}),
            "prompt+chosen": (
                "preference",
                {"prompt": before, "chosen": turns, "rejected": other},
            ),
            "label": ("label", {"messages": turns, "label": True}),
            "prompt": ("prompt", {"prompt": before}),
            "ranking": ("ranking", {"prompt": before, "replies": [[last], "other"]}),
        }[layout]

    good = [user("x"), assistant("y"), user("z"), assistant("w")]
    kind, bad = rows(turns)
    loaded = read([rows(good)[1], bad], kind)
    ((found, count),) = loaded.dropped.items()
    ending = {
        "consecutive turns with the same role": (
            "consecutive turns with the same role",
            "prompt ends with an assistant turn",
        )
    }
    assert found.startswith(ending.get(reason, reason))
    assert count == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant([{"type": "image_url", "image_url": {}}]), "part that is not text (image_url)"),
        (assistant("R", weight=0.5), "weight is neither 0 nor 1"),
        (assistant("R", weight=0), "every reply has weight 0"),
        (assistant(None), "message content is not text"),
        (assistant(None, tool_calls=["x"]), "a tool call has no function name"),
        (assistant("R", reasoning_content=["x"]), "reasoning is not text"),
    ],
)
def test_messages_that_cannot_be_read_are_counted(read, message, reason):
    good = {"messages": [user("Q"), assistant("R")]}
    loaded = read([good, {"messages": [user("Q"), message]}], "sft")
    ((found, count),) = loaded.dropped.items()
    assert reason in found
    assert count == 1


def test_sides_with_different_system_messages_are_no_pair(read):
    def side(text, reply):
        return [system(text), user("Q"), assistant(reply)]

    good = {"prompt": "Q", "chosen": side("S", "A"), "rejected": side("S", "B")}
    bad = good | {"rejected": side("T", "B")}
    assert read([good, bad], "preference").dropped == {"prompts differ": 1}
    bare_sides = {"prompt": "Q", "chosen": [system("S"), assistant("A")], "rejected": "B"}
    assert read([good, bare_sides], "preference").dropped == {"system messages differ": 1}


def test_rows_of_one_file_may_have_different_layouts(read):
    rows = [{"messages": [user("Q"), assistant("R")]}, {"prompt": "P", "completion": "S"}]
    assert bare(read(rows, "sft")) == [sft("Q", "R"), sft("P", "S")]


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (
            [{"q": {"text": "Q"}, "a": ["R"]}],
            {"prompt": "q.text", "completion": "a.0"},
            sft("Q", "R"),
        ),
        (
            [{"p": "Q", "c": "R", "who": "S"}],
            {"prompt": "p", "completion": "c", "system": "who"},
            None,
        ),
    ],
)
def test_a_mapping_reaches_into_columns(read, rows, columns, expected):
    expected = expected or sft([system("S"), user("Q")], "R")
    assert bare(read(rows, "sft", columns=columns)) == [expected]


@pytest.mark.parametrize(
    ("winner", "chosen"), [("b", "B"), ("model_a", "A"), (0, "A"), (1, "B"), ("A", "A")]
)
def test_two_replies_and_their_winner_can_be_mapped(read, winner, chosen):
    columns = {"prompt": "q", "response_a": "x.0", "response_b": "x.1", "winner": "w"}
    rows = [{"q": "Q", "x": ["A", "B"], "w": winner}, {"q": "P", "x": ["C", "D"], "w": "tie"}]
    loaded = read(rows, "preference", columns=columns)
    assert loaded.rows[0]["chosen"] == [assistant(chosen)]
    assert loaded.dropped == {"tie": 1}


def test_two_replies_are_recognized_by_the_names_of_their_fields(read):
    replies = {"prompt": "Q", "response_a": "A", "response_b": "B"}
    assert bare(read([replies | {"winner": "b"}], "preference")) == [pair("Q", "B", "A")]
    scored = read([replies | {"score_a": 4, "score_b": 1.5}], "preference")
    assert bare(scored) == [pair("Q", "A", "B", margin=2.5)]


@pytest.mark.parametrize("winners", [[1, 2], [1, 1], [0, 1, 2]])
def test_winners_that_may_count_from_one_are_refused(read, winners):
    columns = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "w"}
    rows = [{"q": f"Q{i}", "x": "A", "y": "B", "w": w} for i, w in enumerate(winners)]
    with pytest.raises(UserError, match=r"data\.columns\.winner: the numbers of column 'w'"):
        read(rows, "preference", columns=columns)


def test_scores_of_two_replies_can_be_mapped(read):
    columns = {"response_a": "x", "response_b": "y", "score_a": "s", "score_b": "t"}
    rows = [{"prompt": "Q", "x": "A", "y": "B", "s": 1, "t": 3.5}]
    assert bare(read(rows, "preference", columns=columns)) == [pair("Q", "B", "A", margin=2.5)]


def test_error_lists_keys_inside_columns(read):
    with pytest.raises(UserError, match=r"columns found: meta \(meta\.q, meta\.a\); map them"):
        read([{"meta": {"q": "Q", "a": "R"}}], "sft")
    with pytest.raises(UserError, match=r"data\.columns\.prompt: 'meta\.x' has no value"):
        read([{"meta": {"q": "Q"}}], "prompt", columns={"prompt": "meta.x"})


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference"),
        (PKU, "preference"),
        (NECTAR, "preference"),
        (oasst_rows()[0], "sft"),
        ({"messages": [user("Q"), assistant("R")]}, "sft"),
        ({"prompt": "Q", "completion": "R", "label": True}, "label"),
        ({"text": "T", "label": 1}, "classification"),
        ({"prompt": "Q", "steps": ["a"], "labels": [1]}, "steps"),
        ({"prompt": "Q", "replies": ["a", "b"]}, "ranking"),
        ({"prompt": "Q"}, "prompt"),
        ({"text": "T"}, "sft"),
    ],
)
def test_guess_kind_from_columns(row, kind):
    assert guess_kind([row], DataSpec("data.jsonl")) == kind


def test_unicode_line_separators_do_not_split_lines(tmp_path):
    text = "one\u2028two\u0085three"
    path = tmp_path / "data.jsonl"
    path.write_text(
        json.dumps({"prompt": text, "completion": text}, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    (row,) = load(DataSpec(str(path)), "sft", seed=0).rows
    assert row["prompt"][0]["content"] == row["completion"][0]["content"] == text


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("encode", [dict, json.dumps])
def test_arguments_of_tool_calls_are_read_under_every_name(read, name, nested, encode):
    call = {"name": "weather", name: encode({"city": "Paris"})}
    turn = assistant("", tool_calls=[{"type": "function", "function": call} if nested else call])
    loaded = read([{"messages": [user("Q"), turn, tool("rain"), assistant("R")]}], "sft")
    function = {"name": "weather", "arguments": {"city": "Paris"}}
    assert loaded.rows[0]["completion"][0]["tool_calls"] == [
        {"type": "function", "function": function}
    ]
    assert not loaded.ignored


def test_keys_of_tool_calls_that_are_not_read_are_named(read):
    call = {
        "type": "function",
        "id": "1",
        "function": {"name": "f", "arguments": {}, "strict": True},
    }
    turn = assistant("", tool_calls=[call])
    loaded = read([{"messages": [user("Q"), turn, tool("rain"), assistant("R")]}], "sft")
    assert loaded.ignored == {"tool call key 'strict'": 1}
    twice = assistant("", tool_calls=[{"name": "f", "args": {"a": 1}, "input": {"b": 2}}])
    good = {"messages": [user("Q"), assistant("R")]}
    loaded = read([{"messages": [user("Q"), twice, tool("r"), assistant("R")]}, good], "sft")
    assert loaded.dropped == {"a tool call has arguments under several names": 1}


@pytest.mark.parametrize("other", ["thinking", "reasoning"])
def test_a_second_reasoning_of_a_message_is_named(read, other):
    turn = assistant("R", reasoning_content="because", **{other: "since"})
    loaded = read([{"messages": [user("Q"), turn]}], "sft")
    assert loaded.rows[0]["completion"][0]["reasoning_content"] == "because"
    assert loaded.ignored == {"reasoning that differs from other reasoning of its message": 1}
    same = assistant("R", reasoning_content="because", **{other: "because\n"})
    assert not read([{"messages": [user("Q"), same]}], "sft").ignored


@pytest.mark.parametrize("box", [r"\boxed{5}", r"\boxed {5}", r"\fbox{5}", r"\boxed{4} \boxed{5}"])
def test_the_answer_of_a_solution_is_its_last_box(read, box):
    loaded = read([{"problem": "Q", "solution": f"So it is\n${box}$."}], "prompt")
    assert loaded.rows[0]["prompt"][0]["answer"] == "5"


def test_an_answer_column_that_differs_from_the_message_is_named(read):
    rows = [{"messages": [user("Q", answer="5")], "answer": answer} for answer in ("6", "5")]
    loaded = read(rows, "prompt")
    assert [row["prompt"][0]["answer"] for row in loaded.rows] == ["5", "5"]
    assert loaded.ignored == {"answer column that differs from the answer of its message": 1}


def test_the_system_message_of_a_pair_of_turns_is_read(read):
    turns = [
        {"system": "S", "input": "Q", "output": "R", "mood": "glad"},
        {"system": "", "input": "Q2", "output": "R2"},
    ]
    loaded = read([{"conversation": turns}], "sft")
    assert loaded.rows[0]["prompt"] == [system("S"), user("Q")]
    assert loaded.rows[0]["completion"] == [assistant("R"), user("Q2"), assistant("R2")]
    assert loaded.ignored == {"message key 'mood'": 1}
