"""Hand-written rows of public preference data and process rewards load with the right values."""

import pytest

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
    user,
)

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
                "prompt": "Q",
                "chosen": [user("Q"), assistant("good")],
                "rating_chosen": 5,
                "rejected": [user("Q"), assistant("bad")],
                "rating_rejected": 4,
            },
            pair("Q", "good", "bad", margin=1.0),
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


def test_a_row_with_two_winners_is_dropped_with_its_reason(read):
    decided = KAGGLE | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    for second in ("winner_model_b", "winner_tie"):
        loaded = read([decided | {second: 1}, decided], "preference")
        assert loaded.dropped == {"more than one of the winner columns is 1": 1}


def test_a_battle_is_judged_up_to_its_turn(read):
    row = ARENA | {
        "conversation_a": [*ARENA["conversation_a"], user("more"), assistant("x")],
        "conversation_b": [*ARENA["conversation_b"], user("more"), assistant("y")],
        "winner": "model_b",
    }
    assert bare(read([row], "preference")) == [pair("Q", "B", "A")]


def test_unread_keys_of_messages_and_lists_are_named(read):
    battle = ARENA | {
        "conversation_a": [user("Q", mood="x"), assistant("A", num_tokens=7)],
        "conversation_b": [user("Q"), assistant("B", num_tokens=None)],
        "winner": "model_b",
    }
    loaded = read([battle, ARENA | {"winner": "model_a"}], "preference")
    assert bare(loaded) == [pair("Q", "A", "B"), pair("Q", "B", "A")]
    assert loaded.ignored == {"message key 'mood'": 1, "message key 'num_tokens'": 1}
    assert read([battle], "prompt").ignored == {"message key 'mood'": 1}
    assert read([NECTAR], "preference").ignored == {"answers key 'model'": 1}
    rated = {"response": "r", "overall_score": 1.0, "custom_system_prompt": "Be brief."}
    ultra = {"instruction": "Q", "completions": [rated, *ULTRA["completions"]]}
    assert read([ultra], "preference").ignored == {
        "completions key 'custom_system_prompt'": 1,
        "completions key 'model'": 1,
    }
    tree = oasst_tree()
    tree["prompt"]["replies"][0]["emojis"] = {"+1": 2}
    ignored = read([tree], "sft").ignored
    assert ignored["prompt key 'emojis'"] == 1
    assert "prompt key 'text'" not in ignored


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_a_pair_with_a_reply_of_weight_zero_is_dropped_and_counted(read, key):
    zero = [assistant("worse", **{key: 0})]
    rows = [
        {"prompt": "Q", "chosen": "good", "rejected": zero},
        {"prompt": "Q", "chosen": zero, "rejected": "bad"},
        ARENA | {"conversation_a": [user("Q"), *zero], "winner": "model_a"},
        {"prompt": "Q", "chosen": "good", "rejected": [assistant("bad", **{key: 1})]},
    ]
    plain = read([rows[0], rows[1], rows[3]], "preference")
    assert bare(plain) == [pair("Q", "good", "bad")]
    assert plain.dropped == {"every reply has weight 0": 2}
    with pytest.raises(UserError, match="every reply has weight 0"):
        read([rows[2]], "preference")
    with pytest.raises(UserError, match="every reply has weight 0"):
        read([{"prompt": "Q", "replies": [zero, "bad"]}], "ranking")
    with pytest.raises(UserError, match="every reply has weight 0"):
        read([{"prompt": "Q", "completion": zero, "label": True}], "label")


@pytest.mark.parametrize("kind", ["sft", "preference", "label", "ranking"])
def test_rows_of_weight_zero_are_dropped_and_counted(read, kind):
    row = {
        "prompt": "Q",
        "completion": "good",
        "chosen": "good",
        "rejected": "bad",
        "label": True,
        "replies": ["good", "bad"],
    }
    weights = [1, 0, None, "0", 0.0, 0.5, "", "x"]
    loaded = read([row | {"prompt": f"Q{i}", "weight": w} for i, w in enumerate(weights)], kind)
    kept = sorted(row["prompt"][0]["content"] for row in loaded.rows)
    assert kept == ["Q0", "Q2", "Q5", "Q6", "Q7"]
    assert loaded.dropped == {"row of weight 0": 3}
    assert loaded.ignored["row weight that is neither 0 nor 1"] == 2
    assert all("weight" not in names for names in loaded.unused_columns.values())


def test_a_kept_or_mapped_column_weight_is_no_weight(read):
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "weight": 0}
    (made,) = read([row], "preference", keep=("weight",)).rows
    assert made["weight"] == 0
    (made,) = read([row], "preference", columns={"margin": "weight"}).rows
    assert made["margin"] == 0


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


def test_math_shepherd_rows_without_a_question_and_with_an_unknown_mark_are_dropped(read):
    texts = [("Q Step 1: a ки", "Q Step 1: a +"), ("Step 1: a ки", "Step 1: a +")]
    texts += [("Q a ки", "Q a +"), ("Q Step 1: a ки", "Q Step 1: a ?")]
    loaded = read([{"input": text, "label": label} for text, label in texts], "steps")
    assert loaded.dropped == {
        'input has no question before "Step 1:"': 2,
        "a step is marked neither + nor -": 1,
    }


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
