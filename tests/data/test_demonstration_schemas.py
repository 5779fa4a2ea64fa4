"""Hand-written rows of public demonstrations and prompts load with the right values."""

import pytest

from rlhf.errors import UserError
from tests.helpers.rows import assistant, bare, sft, system, tool, user

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


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "q", "reward_model": {"ground_truth": '["34", "035"]'}}, ["34", "035"]),
        ({"prompt": "q", "answer": "[1, 2]"}, "[1, 2]"),  # an interval
        ({"prompt": "q", "answer": '["a"'}, '["a"'),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "It is 5.", "answer": 5},
                ]
            },
            "5",
        ),
    ],
)
def test_answers_in_other_places_and_types(read, row, answer):
    (loaded,) = read([row], "prompt").rows
    assert loaded["prompt"][-1]["answer"] == answer


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
    assert "ignored: answer cell without an answer in 1 row" in loaded.summary()


def test_scoring_keeps_the_answer_column(read):
    row = {"prompt": "Q", "completion": "7", "answer": 7}
    (made,) = bare(read([row], "sft", with_answer_and_tests=True))
    assert made == sft([user("Q", answer="7")], "7")
    loaded = read([row], "sft")
    assert bare(loaded) == [sft("Q", "7")]
    assert "columns not used: answer" in loaded.summary()


def test_program_tests_are_on_the_last_user_message(read):
    row = {"prompt": "Q", "tests": ["assert f(1) == 1", "assert f(2) == 2"]}
    (made,) = bare(read([row], "prompt"))
    assert made["prompt"] == [user("Q", tests="assert f(1) == 1\nassert f(2) == 2")]


def test_lists_of_texts_are_alternating_turns(read):
    rows = [{"conversations": ["Q", "good"]}, {"conversations": '["Q", "a", "R", "b"]'}]
    completion = [assistant("a"), user("R"), assistant("b")]
    expected = [sft("Q", "good"), {"prompt": [user("Q")], "completion": completion}]
    assert sorted(bare(read(rows, "sft")), key=str) == sorted(expected, key=str)
    with pytest.raises(UserError, match="no assistant turn"):
        read([{"conversations": ["Q"]}], "sft")
    with pytest.raises(UserError, match="not an object"):  # alternatives, not turns
        read([{"prompt": "Q", "chosen": ["a", "b"], "rejected": ["c", "d"]}], "preference")


def test_the_tests_of_mbpp_are_read(read):
    rows = [{"text": "Q", "code": "c", "test_list": ["assert f(1) == 1", "assert f(2) == 2"]}]
    (row,) = read(rows, "prompt").rows
    assert row["prompt"][-1]["tests"] == "assert f(1) == 1\nassert f(2) == 2"


def test_a_tree_without_a_reply_is_named(read):
    message = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Q"}
    with pytest.raises(UserError, match="no row contains one of this kind"):
        read([message], "sft")


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": "<think>\n1+1\n</think>\n\n2",
                    "reasoning_content": "1+1",
                },
            ]
        },
        {"prompt": "q", "completion": "<think>1+1</think>2", "thinking": "1+1"},
        {"prompt": "q", "completion": "<think></think>2", "thinking": "1+1"},
    ],
)
def test_reasoning_that_is_given_twice_is_kept_once(read, row):
    loaded = read([row], "sft")
    (reply,) = loaded.rows[0]["completion"]
    assert reply == {"role": "assistant", "content": "2", "reasoning_content": "1+1"}
    assert not loaded.ignored


def test_reasoning_that_differs_from_the_block_in_the_content_is_noted(read):
    row = {"prompt": "q", "completion": "<think>other</think>2", "reasoning": "1+1"}
    loaded = read([row], "sft")
    (reply,) = loaded.rows[0]["completion"]
    assert (reply["content"], reply["reasoning_content"]) == ("2", "1+1")
    assert loaded.ignored == {"reasoning that differs from other reasoning of its message": 1}


def test_roles_of_tool_calls_of_other_toolkits(read):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "ipython", "content": "r"},
        {"role": "assistant", "content": "done"},
    ]
    (row,) = read([{"messages": messages}], "sft").rows
    call, result, _ = row["completion"]
    assert call["role"] == "assistant"
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert result == {"role": "tool", "content": "r"}
