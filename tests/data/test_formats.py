"""All layouts give the same canonical rows; unusable rows are dropped with a reason."""

import json

import pytest

from rlhf.data import DataSpec, load
from rlhf.data.conversation import parse_hh_dialogue


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path):
    """Write rows as JSON lines and load them."""

    def read(rows, kind, *, keep=(), **spec):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load(DataSpec(str(path), **spec), kind, seed=0, keep=keep)

    return read


def only(loaded):
    """The single row without its source."""
    (row,) = loaded.rows
    row.pop("source")
    return row


SFT = {"prompt": [user("Hi")], "completion": [assistant("Hello")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"question": "Hi", "answer": "Hello", "final": "no"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "context": None, "response": "Hello", "category": "x"},
        {"input": "Hi", "output": "Hello"},
        {"prompt": [user("Hi")], "completion": "Hello"},
        {"prompt": [user("Hi")], "completion": [assistant("Hello")]},
        {"prompt": "Hi", "completion": [user("Hi"), assistant("Hello")]},
        {"messages": [user("Hi"), assistant("Hello")]},
        {"messages": [user("Hi"), assistant("Hello"), user("unanswered")]},
        {"messages": [{"role": "user", "content": "Hi", "weight": 1}, assistant("Hello")]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": "\n\nHuman: Hi\n\nAssistant: Hello"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"},
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant:",
            "completion": "\n\nHuman: Hi\n\nAssistant: Hello",
        },
    ],
)
def test_sft_layouts(read, row):
    assert only(read([row], "sft")) == SFT


def test_alpaca_input_follows_the_instruction(read):
    row = only(read([{"instruction": "Sum up.", "input": "A b.", "output": "B."}], "sft"))
    assert row["prompt"] == [user("Sum up.\n\nA b.")]


@pytest.mark.parametrize(
    ("instruction", "context", "prompt"),
    [
        ("Multiply 12 by this number.", "2", "Multiply 12 by this number.\n\n2"),
        ("Give a synonym.", "a", "Give a synonym.\n\na"),
        ("", "Do it.", "Do it."),
        ("Sum up:\nA b.", "A b.", "Sum up:\nA b."),
        ("Passage: the sea is very salty. Why?", "the sea is very salty", None),
    ],
)
def test_a_context_is_left_out_only_if_the_instruction_quotes_it(
    read, instruction, context, prompt
):
    row = only(read([{"instruction": instruction, "input": context, "output": "R"}], "sft"))
    assert row["prompt"] == [user(instruction if prompt is None else prompt)]


def test_messages_as_json_text_are_messages(read):
    """pandas and `datasets` write them like this to CSV files."""
    turns = [user("Hi"), assistant("Hello")]
    other = [user("Hi"), assistant("Go")]
    row = {"prompt": json.dumps(turns[:1]), "completion": json.dumps(turns[1:])}
    assert only(read([row], "sft")) == SFT
    pair = {"prompt": turns[:1], "chosen": turns[1:], "rejected": other[1:]}
    sides = {"chosen": json.dumps(turns), "rejected": json.dumps(other)}
    for row in (sides, {"prompt": "Hi", **sides}):
        assert only(read([row], "preference")) == pair
    for text in ('[{"a": 1}]', "[1, 2]", "[]", '{"role": "king"}', "[not json]"):
        row = only(read([{"prompt": text, "completion": text}], "sft"))
        assert row == {"prompt": [user(text)], "completion": [assistant(text)]}


def test_every_reply_is_learned_from_several_turns(read):
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    row = only(read([{"messages": [*turns, user("unanswered")]}], "sft"))
    assert row == {"prompt": turns[:1], "completion": turns[1:]}


def test_a_label_judges_the_last_reply(read):
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    row = only(read([{"messages": turns, "label": True}], "label"))
    assert row == {"prompt": turns[:3], "completion": turns[3:], "label": True}


PAIR = {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"question": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        {
            "prompt": "Hi",  # UltraFeedback: a prompt and two whole conversations
            "chosen": [user("Hi"), assistant("Yes")],
            "rejected": [user("Hi"), assistant("No")],
            "messages": [user("Hi"), assistant("Yes")],
        },
        {"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No",
        },
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes", "rejected": " No\n"},
    ],
)
def test_preference_layouts(read, row):
    assert only(read([row], "preference")) == PAIR


def test_shared_turns_are_the_prompt_however_long(read):
    opening = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*opening, assistant("d")], "rejected": [*opening, assistant("e")]}
    made = only(read([row], "preference"))
    assert made == {"prompt": opening, "chosen": [assistant("d")], "rejected": [assistant("e")]}


def test_margin_is_kept_as_a_float(read):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": 2}
    assert only(read([row], "preference")) == PAIR | {"margin": 2.0}


@pytest.mark.parametrize(
    ("label", "value"), [(True, True), (0, False), ("True", True), (1.0, True)]
)
def test_label_rows(read, label, value):
    row = only(read([{"prompt": "Hi", "completion": "Hello", "label": label}], "label"))
    assert row == SFT | {"label": value}
    assert type(row["label"]) is bool


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi"},
        {"problem": "Hi", "reply": "x"},
        {"text": "Hi"},
        {"messages": [user("Hi"), assistant("Hello")]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    ],
)
def test_prompt_layouts(read, row):
    assert only(read([row], "prompt")) == {"prompt": [user("Hi")]}


@pytest.mark.parametrize(
    ("label", "value"), [(1, 1), (2.5, 2.5), ("3", 3), ("-0.5", -0.5), (True, 1)]
)
def test_classification_rows(read, label, value):
    row = only(read([{"sentence": "fine", "label": label}], "classification"))
    assert row == {"text": "fine", "label": value}
    assert type(row["label"]) is type(value)


def test_mapping_beats_recognition(read):
    row = {"prompt": "no", "question": "Hi", "answer": "no", "final": "Hello", "messages": "no"}
    loaded = read([row], "sft", columns={"prompt": "question", "completion": "final"})
    assert only(loaded) == SFT


def test_mapping_one_field_leaves_the_others_to_recognition(read):
    loaded = read([{"story": "Hi", "answer": "Hello"}], "sft", columns={"prompt": "story"})
    assert only(loaded) == SFT


def test_a_mapped_column_serves_one_field_only(read):
    """The mapping uses the column `prompt`, so the prompt is found under another name."""
    row = {"prompt": "Hello", "question": "Hi"}
    assert only(read([row], "sft", columns={"completion": "prompt"})) == SFT


def test_mapping_chooses_the_layout(read):
    row = {"prompt": "no", "completion": "no", "chat": [user("Hi"), assistant("Hello")]}
    assert only(read([row], "sft", columns={"messages": "chat"})) == SFT


def test_system_message_comes_first_unless_the_row_has_its_own(read):
    own = {"messages": [{"role": "system", "content": "own"}, user("Hi"), assistant("Hello")]}
    for row, system in [(own, "own"), ({"prompt": "Hi", "completion": "Hello"}, "Be kind.")]:
        made = only(read([row], "sft", system="Be kind."))
        assert made["prompt"] == [{"role": "system", "content": system}, user("Hi")]


def test_source_and_kept_columns(read, tmp_path):
    rows = [{"prompt": "Hi", "annotator": "a7"}, {"prompt": "Ho"}]
    loaded = read(rows, "prompt", keep=("annotator",))
    assert {row["prompt"][0]["content"]: row["annotator"] for row in loaded.rows} == {
        "Hi": "a7",
        "Ho": None,
    }
    assert loaded.rows[0]["source"] == str(tmp_path / "data.jsonl")


def tool(text):
    return {"role": "tool", "content": text}


def test_a_rated_reply_is_the_last_turn(read):
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": 0.5}
    found = only(read([row], "classification"))
    assert found["prompt"] == [user("a"), assistant("b"), user("c")]
    assert found["completion"] == [assistant("d")]
    assert found["label"] == 0.5


def test_rankings_and_steps(read):
    found = only(read([GOOD["ranking"]], "ranking"))
    assert found["replies"] == [[assistant("Yes")], [assistant("No")]]
    assert only(read([GOOD["steps"]], "steps"))["labels"] == [1, None]


GOOD = {
    "sft": {"prompt": "Hi", "completion": "Hello"},
    "preference": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "label": {"prompt": "Hi", "completion": "Hello", "label": True},
    "prompt": {"prompt": "Hi"},
    "text": {"text": "Hi"},
    "classification": {"text": "Hi", "label": 1},
    "rated": {"text": "Hi"},
    "ranking": {"prompt": "Hi", "replies": ["Yes", "No"]},
    "steps": {"prompt": "Hi", "steps": ["a", "b"], "labels": [1, None]},
}


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("sft", {"prompt": " \n"}, "empty prompt"),
        ("sft", {"prompt": None}, "empty prompt"),
        ("sft", {"prompt": []}, "empty prompt"),
        ("sft", {"prompt": 3}, "neither text nor messages"),
        ("sft", {"prompt": {"role": "user"}}, "neither text nor messages"),
        ("sft", {"prompt": ["Hi"]}, "message is not an object with a role and a content"),
        ("sft", {"prompt": [{"role": "user", "content": None}]}, "message content is not text"),
        ("sft", {"prompt": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
        ("sft", {"prompt": [{"role": "boss", "content": "x"}]}, "unknown role 'boss'"),
        ("sft", {"prompt": [user("a"), user("b")]}, "consecutive turns with the same role"),
        ("sft", {"prompt": [assistant("a"), user("b")]}, "first turn is not a user turn"),
        ("sft", {"prompt": [user("a"), assistant("b")]}, "prompt ends with an assistant turn"),
        (
            "sft",
            {"prompt": [user("a"), {"role": "system", "content": "b"}]},
            "system message after the start",
        ),
        ("sft", {"prompt": [user("a"), assistant(""), user("b")]}, "empty turn in the prompt"),
        ("sft", {"completion": "  "}, "empty reply"),
        ("sft", {"completion": None}, "empty reply"),
        ("sft", {"completion": "half a pair: \ud83d"}, "broken Unicode"),
        (
            "sft",
            {"completion": [assistant("a"), assistant("b")]},
            "consecutive turns with the same role",
        ),
        (
            "sft",
            {"completion": [assistant("a"), user("b"), assistant("c")]},
            "reply contains a user or system turn",
        ),
        (
            "sft",
            {"completion": [assistant("a"), tool("b")]},
            "reply does not begin and end with an assistant turn",
        ),
        ("sft", {"completion": [user("Ho"), assistant("b")]}, "prompts differ"),
        ("preference", {"chosen": "No "}, "chosen equals rejected"),
        ("preference", {"chosen": ""}, "empty reply"),
        ("label", {"label": "maybe"}, "label is not true or false"),
        ("label", {"label": 2}, "label is not true or false"),
        ("label", {"label": None}, "label is not true or false"),
        ("text", {"text": ""}, "empty text"),
        ("text", {"text": 7}, "text is not a string"),
        ("classification", {"label": None}, "label is not a number"),
        ("classification", {"label": float("nan")}, "label is not a number"),
        ("classification", {"label": "good"}, "label is not a number"),
        ("rated", {"text": "  "}, "empty text"),
        ("ranking", {"replies": ["Yes"]}, "fewer than two replies"),
        ("ranking", {"replies": ["Yes", ""]}, "empty reply"),
        ("ranking", {"replies": ["Yes", "No", "Yes "]}, "equal replies"),
        ("ranking", {"replies": ["Yes", "half a pair: \ud83d"]}, "broken Unicode"),
        ("steps", {"labels": [1]}, "labels are not a list with one label for each step"),
        ("steps", {"labels": [1, 2]}, "a step's label is not true, false or missing"),
        ("steps", {"steps": ["a", " "]}, "steps are not a list of texts"),
    ],
)
def test_unusable_rows_are_counted_by_reason(read, kind, change, reason):
    good = GOOD[kind]
    loaded = read([good, good | change, good], kind)
    assert loaded.dropped == {reason: 1}
    assert (len(loaded.rows), loaded.total, loaded.unused) == (2, 3, 0)
    assert loaded.summary() == f"2 of 3 rows; dropped 1: 1 {reason}"


def test_a_conversation_without_a_reply_is_dropped(read):
    rows = [{"messages": [user("Hi")]}, {"messages": [user("Hi"), assistant("Hello")]}]
    assert read(rows, "sft").dropped == {"no assistant turn": 1}


# HH-RLHF, the traps counted in the real files


def hh(*turns):
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_dialogue_markers_inside_a_line_are_text():
    turns = parse_hh_dialogue(
        "\n\nHuman: Say  Human: twice\n Assistant: x\n\nAssistant: No.\n\nWhy?"
    )
    assert turns == [user("Say  Human: twice\n Assistant: x"), assistant("No.\n\nWhy?")]


@pytest.mark.parametrize("opening", ["", " ", "\n", "\n\n\n"])
def test_a_dialogue_may_begin_with_any_white_space(opening):
    assert parse_hh_dialogue(opening + "Human: a\n\nAssistant: b") == [user("a"), assistant("b")]


def test_only_the_last_turn_differs(read):
    row = {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "c", "e")}
    assert only(read([row], "preference"))["prompt"] == [user("a"), assistant("b"), user("c")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("a", "b"), hh("A", "c"), "prompts differ"),
        (hh("a", "b", "c", "d"), hh("a", "e"), "prompts differ"),
        (hh("a", "b", "c", "d"), hh("a", "b"), "prompts differ"),
        (hh("a", "b"), hh("a", ""), "empty reply"),
        (hh("a", "b"), hh("a", "b"), "chosen equals rejected"),
        (hh("a", "b") + "\n\nAssistant: c", hh("a", "b") + "\n\nAssistant: d", "prompt ends"),
        (
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: d",
            "consecutive turns with the same role",
        ),
        (hh("", "b"), hh("", "c"), "empty prompt"),
        ("b", "c", "plain text without a prompt column"),
    ],
)
def test_dialogue_pairs_that_cannot_be_parsed(read, chosen, rejected, reason):
    good = {"chosen": hh("x", "y"), "rejected": hh("x", "z")}
    loaded = read([good, {"chosen": chosen, "rejected": rejected}], "preference")
    ((found, count),) = loaded.dropped.items()
    assert found.startswith(reason)
    assert count == 1


def test_a_reply_that_runs_on_into_the_next_turn_is_dropped(read):
    good = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "b", "rejected": "c"}
    loaded = read([good, good | {"chosen": "b\n\nHuman: more"}], "preference")
    assert loaded.dropped == {"reply contains a user or system turn": 1}


def test_a_marker_in_a_plain_reply_is_text(read):
    row = {"prompt": "Write a dialogue.", "completion": "\n\nHuman: a\n\nAssistant: b"}
    assert only(read([row], "sft"))["completion"] == [assistant("\n\nHuman: a\n\nAssistant: b")]
