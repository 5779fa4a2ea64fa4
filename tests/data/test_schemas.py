"""Hand-written rows in the formats of public datasets load with the right values."""

import json

import pytest

from rlhf.common.files import write_jsonl
from rlhf.data import DataSpec, load
from rlhf.data.reader import guess_kind
from rlhf.errors import UserError


def system(text):
    return {"role": "system", "content": text}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


@pytest.fixture
def read(tmp_path):
    def read(rows, kind, *, keep=(), facts=False, **spec):
        path = tmp_path / "data.jsonl"
        write_jsonl(path, rows)
        return load(DataSpec(str(path), **spec), kind, seed=0, keep=keep, facts=facts)

    return read


def bare(loaded):
    """The rows without their source, sorted."""
    rows = [{k: v for k, v in row.items() if k != "source"} for row in loaded.rows]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def pair(prompt, chosen, rejected, **more):
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return {
        "prompt": prompt,
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)],
        **more,
    }


def sft(prompt, completion):
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    completion = [assistant(completion)] if isinstance(completion, str) else completion
    return {"prompt": prompt, "completion": completion}


PKU = {
    "prompt": "Q",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
SHP = {"post_id": "x", "history": "Q", "human_ref_A": "A", "human_ref_B": "B"}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "Q"},
    "quotes_0": {},
    "answer_0": "zero",
    "answer_1": "one",
}
ARENA = {
    "question_id": "1",
    "model_a": "m",
    "model_b": "n",
    "conversation_a": [user("Q"), assistant("A")],
    "conversation_b": [user("Q"), assistant("B")],
    "turn": 1,
}
KAGGLE = {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]'}
NECTAR = {
    "prompt": "\n\nHuman: Q\n\nAssistant: ",
    "answers": [
        {"answer": "second", "model": "m", "rank": 2.0},
        {"answer": "first", "model": "n", "rank": 1.0},
        {"answer": "third", "model": "o", "rank": 3.0},
    ],
    "turns": 1,
}
ULTRA = {
    "instruction": "Q",
    "models": ["m"],
    "completions": [
        {"response": "good", "overall_score": 8.5, "model": "m"},
        {"response": "bad", "overall_score": 4.0, "model": "n"},
    ],
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PKU, pair("Q", "zero", "one")),
        (PKU | {"better_response_id": 1}, pair("Q", "one", "zero")),
        (SHP | {"labels": 1}, pair("Q", "A", "B")),
        (SHP | {"labels": 0}, pair("Q", "B", "A")),
        (WEBGPT | {"score_0": 0.25, "score_1": -0.25}, pair("Q", "zero", "one", margin=0.5)),
        (WEBGPT | {"score_0": -1.0, "score_1": 1.0}, pair("Q", "one", "zero", margin=2.0)),
        (ARENA | {"winner": "model_a"}, pair("Q", "A", "B")),
        (ARENA | {"winner": "model_b"}, pair("Q", "B", "A")),
        (
            KAGGLE | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
            pair("Q", "B", "A"),
        ),
        (
            {
                "context": [user("a"), assistant("b"), user("Q")],
                "response1": "one",
                "response2": "two",
                "overall_preference": -2,
                "domain": "general",
            },
            pair([user("a"), assistant("b"), user("Q")], "one", "two", margin=2.0),
        ),
        (
            {"prompt": "Q", "response_1": "one", "response_2": "two", "preference_strength": 1},
            pair("Q", "two", "one", margin=1.0),
        ),
        (ULTRA, pair("Q", "good", "bad", margin=4.5)),
        (
            {"instruction": "Q", "input": "x", "output_1": "a", "output_2": "b", "preference": 2},
            pair("Q\n\nx", "b", "a"),
        ),
        (
            {
                "info": {"id": "1", "post": "Long post", "title": "t"},
                "summaries": [{"text": "a", "policy": "p"}, {"text": "b", "policy": "q"}],
                "choice": 1,
            },
            pair("Long post", "b", "a"),
        ),
        (
            {
                "input": {"messages": [user("Q")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [assistant("good")],
                "non_preferred_output": [assistant("bad")],
            },
            pair("Q", "good", "bad"),
        ),
        # Plain layouts with columns that carry meaning.
        (
            {"system": "Be kind.", "question": "Q", "chosen": "good", "rejected": "bad"},
            pair([system("Be kind."), user("Q")], "good", "bad"),
        ),
        (
            {
                "prompt": "Q",
                "prompt_id": "1",
                "chosen": [user("Q"), assistant("good")],
                "rejected": [user("Q"), assistant("bad")],
                "messages": [user("Q"), assistant("good")],
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            },
            pair("Q", "good", "bad", margin=1.5),
        ),
        (
            {
                "instruction": "Q",
                "chosen_response": "good",
                "rejected_response": "bad",
                "chosen_rating": 9,
                "rejected_rating": 5,
            },
            pair("Q", "good", "bad", margin=4.0),
        ),
        (
            {
                "prompt": "Q",
                "chosen": [user("Q"), assistant("good")],
                "chosen-rating": 5.0,
                "rejected": [user("Q"), assistant("bad")],
                "rejected-rating": 3.5,
            },
            pair("Q", "good", "bad", margin=1.5),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            pair("Q", "good", "bad"),
        ),
        (
            {  # several turns, of which the prompt column holds the first
                "prompt": "a",
                "chosen": [user("a"), assistant("b"), user("c"), assistant("good")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("bad")],
            },
            pair([user("a"), assistant("b"), user("c")], "good", "bad"),
        ),
        (
            {
                "prompt": "Q",
                "chosen": [system("S"), user("Q"), assistant("good")],
                "rejected": [system("S"), user("Q"), assistant("bad")],
            },
            pair([system("S"), user("Q")], "good", "bad"),
        ),
        (
            {
                "prompt": "Q",
                "chosen": [system("S"), assistant("good")],
                "rejected": [system("S"), assistant("bad")],
            },
            pair([system("S"), user("Q")], "good", "bad"),
        ),
    ],
)
def test_pairs(read, row, expected):
    assert bare(read([row], "preference")) == [expected]


@pytest.mark.parametrize(
    ("row", "winner"),
    [
        (WEBGPT | {"score_0": 0.0}, {"score_1": 0.0}),
        (ARENA, {"winner": "tie"}),
        (ARENA, {"winner": "tie (bothbad)"}),
        (ARENA, {"winner": "both_bad"}),
        (KAGGLE, {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}),
        (
            {"context": [user("Q")], "response1": "one", "response2": "two"},
            {"overall_preference": 0},
        ),
        (
            {"prompt": "Q", "response_1": "one", "response_2": "two"},
            {"preference_strength": 0},
        ),
    ],
)
def test_ties_are_dropped_and_counted(read, row, winner):
    decided = {key: {"tie": "model_a"}.get(value, 1) for key, value in winner.items()}
    if "winner" in winner:
        decided = {"winner": "model_a"}
    if "winner_tie" in winner:
        decided = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    loaded = read([row | winner, row | decided], "preference")
    assert loaded.dropped == {"tie": 1}
    assert len(loaded.rows) == 1


def test_a_battle_is_judged_up_to_its_turn(read):
    row = ARENA | {
        "conversation_a": [*ARENA["conversation_a"], user("more"), assistant("x")],
        "conversation_b": [*ARENA["conversation_b"], user("more"), assistant("y")],
        "winner": "model_b",
    }
    assert bare(read([row], "preference")) == [pair("Q", "B", "A")]


def test_nectar_gives_every_pair_and_a_ranking(read):
    made = bare(read([NECTAR], "preference"))
    expected = [("first", "second"), ("first", "third"), ("second", "third")]
    assert made == [pair("Q", better, worse) for better, worse in expected]
    (ranking,) = bare(read([NECTAR], "ranking"))
    assert ranking["replies"] == [[assistant(text)] for text in ("first", "second", "third")]
    assert bare(read([NECTAR], "prompt")) == [{"prompt": [user("Q")]}]


def test_helpsteer_pairs_the_replies_to_one_prompt(read):
    rows = [
        {"prompt": "Q", "response": "worse", "helpfulness": 1, "verbosity": 2},
        {"prompt": "other", "response": "only", "helpfulness": 1, "verbosity": 2},
        {"prompt": "Q", "response": "better", "helpfulness": 4, "verbosity": 2},
        {"prompt": "Q", "response": "even", "helpfulness": 4, "verbosity": 2},
    ]
    loaded = read(rows, "preference")
    assert bare(loaded) == [
        pair("Q", "better", "worse", margin=3.0),
        pair("Q", "even", "worse", margin=3.0),
    ]
    assert loaded.dropped == {"tie": 1, "fewer than two replies": 1}
    assert "columns not used: verbosity" in loaded.summary()
    assert "read as HelpSteer" in loaded.summary()


def test_helpsteer_row_without_a_score_is_dropped(read):
    rows = [
        {"prompt": "Q", "response": "worse", "helpfulness": 1},
        {"prompt": "Q", "response": "better", "helpfulness": 4},
        {"prompt": "Q", "response": "unrated"},
    ]
    loaded = read(rows, "preference")
    assert bare(loaded) == [pair("Q", "better", "worse", margin=3.0)]
    assert loaded.dropped == {"reply without a score": 1}


def test_helpsteer_writes_turns_into_the_prompt(read):
    text = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    row = {"prompt": text, "response": "d", "helpfulness": 4}
    (made,) = bare(read([row], "sft"))
    assert made == sft([user("a"), assistant("b"), user("c")], "d")


def test_pku_labels_of_a_cost_model(read):
    (row,) = read([PKU], "preference", keep=("chosen_unsafe", "rejected_unsafe")).rows
    assert row["chosen"] == [assistant("one")]
    assert (row["chosen_unsafe"], row["rejected_unsafe"]) == (False, True)


OASST = [
    ("1", None, "prompter", "Q", None),
    ("2", "1", "assistant", "good", 0),
    ("3", "1", "assistant", "bad", 1),
    ("4", "2", "prompter", "more", None),
    ("5", "4", "assistant", "deep", None),
]


def oasst_rows():
    keys = ("message_id", "parent_id", "role", "text", "rank")
    return [dict(zip(keys, values, strict=True)) | {"lang": "en"} for values in OASST]


def oasst_tree():
    nodes = {row["message_id"]: {**row, "replies": []} for row in oasst_rows()}
    for node in nodes.values():
        if node["parent_id"]:
            nodes[node["parent_id"]]["replies"].append(node)
    return {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": nodes["1"]}


@pytest.mark.parametrize("rows", [oasst_rows(), [oasst_tree()]], ids=["messages", "trees"])
def test_open_assistant(read, rows):
    deep = [user("Q"), assistant("good"), user("more")]
    expected = [sft("Q", "good"), sft("Q", "bad"), sft(deep, "deep")]
    made = bare(read(rows, "sft"))
    assert sorted(made, key=str) == sorted(expected, key=str)
    loaded = read(rows, "preference")
    assert bare(loaded) == [pair("Q", "good", "bad")]
    assert loaded.dropped == {"fewer than two ranked replies": 1}
    prompts = [row["prompt"] for row in bare(read(rows, "prompt"))]
    assert sorted(prompts, key=len) == [[user("Q")], deep]


def test_messages_without_usable_ids_are_counted(read):
    node = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "q"}
    reply = {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "r"}
    rows = [
        node,
        reply,
        reply | {"text": "second"},
        reply | {"message_id": ["c"]},
        reply | {"message_id": None},
        reply | {"message_id": "d", "parent_id": {"id": "a"}},
        reply | {"message_id": "e", "parent_id": "f"},
        reply | {"message_id": "f", "parent_id": "e"},
    ]
    loaded = read(rows, "sft")
    assert bare(loaded) == [{"prompt": [user("q")], "completion": [assistant("r")]}]
    assert loaded.dropped == {
        "message_id is not an id": 2,
        "message_id is repeated": 1,
        "parent_id is not an id": 1,
        "message in a cycle of parents": 2,
    }


def test_integers_beyond_every_float_are_read_or_counted(read):
    pair = {"prompt": "q", "response_1": "a", "response_2": "b"}
    rows = [pair | {"preference_strength": 10**400}, pair | {"preference_strength": 2}]
    loaded = read(rows, "preference")
    assert loaded.dropped == {"preference_strength is not a number": 1}
    (row,) = read([{"question": "q", "final": 10**400}], "prompt").rows
    assert row["prompt"][-1]["answer"] == str(10**400)


def test_deleted_messages_and_orphans_are_counted(read):
    rows = oasst_rows()
    rows[4]["deleted"] = True
    rows.append({**rows[1], "message_id": "9", "parent_id": "nowhere"})
    loaded = read(rows, "sft")
    assert loaded.dropped == {"deleted message": 1, "message without its parent": 1}
    assert len(loaded.rows) == 2


def test_math_shepherd(read):
    text = "What is 2*3+1? Step 1: 2*3=6 ки\nStep 2: 6+1=8 The answer is: 8 ки"
    label = "What is 2*3+1? Step 1: 2*3=6 +\nStep 2: 6+1=8 The answer is: 8 -"
    made = bare(read([{"input": text, "label": label, "task": "GSM8K"}], "steps"))
    assert made == [
        {
            "prompt": [user("What is 2*3+1?")],
            "steps": ["Step 1: 2*3=6", "Step 2: 6+1=8 The answer is: 8"],
            "labels": [1, 0],
        }
    ]


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": False}


def test_prm800k(read):
    row = {
        "labeler": "x",
        "question": {"problem": "Q", "ground_truth_answer": "7", "pre_generated_steps": []},
        "label": {
            "steps": [
                {
                    "completions": [completion("right", 1), completion("wrong", -1)],
                    "human_completion": None,
                    "chosen_completion": 0,
                },
                {
                    "completions": [completion("bad", -1)],
                    "human_completion": {"text": "mine", "rating": None},
                    "chosen_completion": None,
                },
                {
                    "completions": [completion("neutral", 0)],
                    "human_completion": None,
                    "chosen_completion": 0,
                },
            ],
            "finish_reason": "solution",
        },
    }
    made = {tuple(r["steps"]): r["labels"] for r in bare(read([row], "steps"))}
    assert made == {
        ("right", "mine", "neutral"): [1, 1, 1],
        ("wrong",): [0],
        ("right", "bad"): [None, 0],
    }
    assert bare(read([row], "prompt")) == [{"prompt": [user("Q", answer="7")]}]


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
OPENAI_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # OpenR1-Math, NuminaMath: the conversation, not the short answer
            {
                "problem": "2+2?",
                "solution": "It is 4.",
                "answer": "4",
                "messages": [user("2+2?"), assistant("<think>...</think> 4")],
            },
            sft("2+2?", "<think>...</think> 4"),
        ),
        ({"problem": "2+2?", "solution": "It is 4.", "answer": "4"}, sft("2+2?", "It is 4.")),
        ({"problem": "2+2?", "solution": "It is 4."}, sft("2+2?", "It is 4.")),
        (
            {"id": "1", "system_prompt": "S", "question": "Q", "response": "R"},
            sft([system("S"), user("Q")], "R"),
        ),
        ({"id": "1", "system_prompt": "", "question": "Q", "response": "R"}, sft("Q", "R")),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q", "weight": None},
                    {"from": "gpt", "value": "R", "weight": None},
                ],
                "system_prompt": "S",
                "source": "airoboros",
            },
            sft([system("S"), user("Q")], "R"),
        ),
        (
            {
                "instruction": "Q",
                "input": "x",
                "output": "R",
                "system": "S",
                "history": [["a", "b"], ["c", "d"]],
            },
            sft(
                [
                    system("S"),
                    *(user("a"), assistant("b"), user("c"), assistant("d")),
                    user("Q\n\nx"),
                ],
                "R",
            ),
        ),
        (
            {"question": "Q", "context": "The sea is salty.", "answer": "Salty."},
            sft("Q\n\nThe sea is salty.", "Salty."),
        ),
        (
            {"messages": [{"role": "developer", "content": "S"}, user("Q"), assistant("R")]},
            sft([system("S"), user("Q")], "R"),
        ),
        (
            {
                "messages": [
                    user([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]),
                    assistant("R"),
                ]
            },
            sft("one two", "R"),
        ),
        (
            {
                "messages": [
                    user("Q"),
                    assistant(None, tool_calls=[OPENAI_CALL]),
                    tool("rain", tool_call_id="c1"),
                    assistant("It rains."),
                ],
                "tools": [{"type": "function", "function": {"name": "weather"}}],
            },
            sft(
                "Q",
                [
                    assistant("", tool_calls=[CALL | {"id": "c1"}]),
                    tool("rain", tool_call_id="c1"),
                    assistant("It rains."),
                ],
            )
            | {"tools": [{"type": "function", "function": {"name": "weather"}}]},
        ),
        (
            {
                "messages": [
                    user("Q"),
                    assistant(
                        None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}
                    ),
                    {"role": "function", "name": "weather", "content": "rain"},
                    assistant("It rains."),
                ]
            },
            sft(
                "Q",
                [
                    assistant("", tool_calls=[CALL]),
                    tool("rain", name="weather"),
                    assistant("It rains."),
                ],
            ),
        ),
        (
            {  # LLaMA-Factory's ShareGPT with tools
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {
                        "from": "function_call",
                        "value": '{"name": "weather", "arguments": {"city": "Oslo"}}',
                    },
                    {"from": "observation", "value": "rain"},
                    {"from": "gpt", "value": "It rains."},
                ],
                "system": "S",
                "tools": '[{"name": "weather", "description": "d"}]',
            },
            sft(
                [system("S"), user("Q")],
                [assistant("", tool_calls=[CALL]), tool("rain"), assistant("It rains.")],
            )
            | {
                "tools": [{"type": "function", "function": {"name": "weather", "description": "d"}}]
            },
        ),
        (
            {"messages": [user("Q"), assistant("R", thinking="Hm.")]},
            sft("Q", [assistant("R", reasoning_content="Hm.")]),
        ),
        (
            {
                "messages": [
                    user("Q"),
                    assistant(
                        [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "R"}]
                    ),
                ]
            },
            sft("Q", [assistant("R", reasoning_content="Hm.")]),
        ),
        (
            {"Question": "Q", "Complex_CoT": "Hm.", "Response": "R"},
            sft("Q", [assistant("R", reasoning_content="Hm.")]),
        ),
        (
            {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
            sft("a", [assistant("b"), user("c"), assistant("d")]),
        ),
        (
            {"messages": [user("Q"), assistant("bad", weight=0), user("v"), assistant("R")]},
            sft("Q", [assistant("bad", weight=0), user("v"), assistant("R")]),
        ),
        ({"text": "Once upon a time."}, {"text": "Once upon a time."}),
    ],
)
def test_demonstrations(read, row, expected):
    assert bare(read([row], "sft")) == [expected]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Q", "answer": "2*3 = <<2*3=6>>6\n#### 1,006"}, "1,006"),
        ({"question": "Q", "answer": "worked\n#### 6", "final": "6"}, "6"),
        ({"messages": [user("Q")], "ground_truth": "6", "dataset": "gsm8k"}, "6"),
        ({"messages": [user("Q")], "ground_truth": ["6", "six"], "dataset": ["x"]}, ["6", "six"]),
        (
            {
                "data_source": "math_dapo",
                "prompt": [user("Q")],
                "ability": "MATH",
                "reward_model": {"ground_truth": "34", "style": "rule"},
                "extra_info": {"index": "x"},
            },
            "34",
        ),
        ({"problem": "Q", "answer": 42}, "42"),
        ({"problem": "Q", "answer": 42.0}, "42"),
        ({"problem": "Q", "answer": 0.5}, "0.5"),
        ({"problem": "Q", "answer": [41, "42"]}, ["41", "42"]),
        ({"problem": "Q", "solution": r"So $x = \boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"problem": "Q", "solution": "$7$", "source": "x"}, "$7$"),
        (
            {"question": "Q", "answers": {"text": ["Rome", "Rome"], "answer_start": [1, 1]}},
            ["Rome"],
        ),
        ({"prompt": [user("Q", answer="42")]}, "42"),
        ({"prompt": [user("Q", answer=42)], "answer": "7"}, "42"),
    ],
)
def test_prompt_answer_is_on_the_last_user_message(read, row, answer):
    assert bare(read([row], "prompt")) == [{"prompt": [user("Q", answer=answer)]}]


def test_svamp_story_reaches_the_prompt(read):
    row = {"Body": "Ann has 3 pens.", "Question": "How many pens?", "Answer": 3.0, "Type": "x"}
    expected = user("How many pens?\n\nAnn has 3 pens.", answer="3")
    assert read([row], "prompt").rows[0]["prompt"] == [expected]


def test_prompt_row_without_an_answer_is_valid(read):
    rows = [{"problem": "Q", "answer": "7"}, {"problem": "P", "answer": None}, {"problem": "O"}]
    assert [row["prompt"][0].get("answer") for row in bare(read(rows, "prompt"))] == [
        "7",
        None,
        None,
    ]
    loaded = read([*rows, {"problem": "N", "answer": {"odd": 1}}], "prompt")
    assert "ignored: answer cell without an answer in 1 rows" in loaded.summary()


def test_scoring_keeps_the_answer_column(read):
    row = {"prompt": "Q", "completion": "7", "answer": 7}
    (made,) = bare(read([row], "sft", facts=True))
    assert made == sft([user("Q", answer="7")], "7")
    loaded = read([row], "sft")
    assert bare(loaded) == [sft("Q", "7")]
    assert "columns not used: answer" in loaded.summary()


def test_program_tests_are_on_the_last_user_message(read):
    row = {"prompt": "Q", "tests": ["assert f(1) == 1", "assert f(2) == 2"]}
    (made,) = bare(read([row], "prompt"))
    assert made["prompt"] == [user("Q", tests="assert f(1) == 1\nassert f(2) == 2")]


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("sft", {"prompt": "Q", "completion": "R", "quality": 3}, "columns not used: quality"),
        (
            "sft",
            {"messages": [user("Q"), assistant("R", mood="glad")]},
            "ignored: message key 'mood' in 1 rows",
        ),
        (
            "sft",
            {"messages": [user("Q"), assistant("R")], "context": "C"},
            "ignored: context column in 1 rows",
        ),
        (
            "sft",
            {"messages": [system("own"), user("Q"), assistant("R")], "system": "other"},
            "ignored: system column that differs from the prompt's system message in 1 rows",
        ),
        ("sft", {"text": "T", "system": "S"}, "ignored: system column in 1 rows"),
        (
            "sft",
            {"messages": [user("Q", reasoning="x"), assistant("R")]},
            "ignored: reasoning of a user message in 1 rows",
        ),
        (
            "sft",
            {"messages": [user("Q", weight=1), assistant("R")]},
            "ignored: weight of a user message in 1 rows",
        ),
        (
            "sft",
            {"messages": [user("Q"), assistant("R"), user("unanswered")]},
            "ignored: turns after the last reply in 1 rows",
        ),
        (
            "preference",
            {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "big"},
            "ignored: margin is not a number in 1 rows",
        ),
        ("prompt", {"turns": ["Q", "more"]}, "ignored: turns after the first in 1 rows"),
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
    assert summary == "4 of 4 rows; ignored: completion column in 1 rows, prompt column in 1 rows"


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
