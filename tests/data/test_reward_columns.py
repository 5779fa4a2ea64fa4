"""Columns that `reward_columns` names become keys of the last user message, for rewards only."""

import json
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.cli.main import main
from rlhf.common.conversation import RESERVED_KEYS
from rlhf.config.data import Kind
from rlhf.data import DataSpec, load
from rlhf.data.leakage import indices_of_shared_prompts
from rlhf.data.splits import prompt_key, split_by_prompt
from rlhf.data.stored_rows import DataPreparationSettings, load_stored
from rlhf.errors import UserError
from rlhf.reward_models.chat_template import MESSAGE_KEYS
from tests.helpers.training import write_rows

CASES = [{"in": "1", "out": "2"}]
ROWS = [
    {"prompt": "2+2?", "answer": "4", "difficulty": 3, "test_cases": CASES, "page": 7},
    {"prompt": "2+3?", "answer": "5", "test_cases": [], "page": 8},
]
COLUMNS = ["difficulty", "test_cases"]


@pytest.fixture
def path(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl", ROWS))


def load_with(path, columns, kind: Kind = "prompt", **options):
    return load(DataSpec(path, reward_columns=columns), kind, seed=None, **options)


def test_columns_become_keys_of_the_last_user_message(path):
    loaded = load_with(path, COLUMNS)
    assert [row["prompt"] for row in loaded.rows] == [
        [
            {
                "role": "user",
                "content": "2+2?",
                "answer": "4",
                "difficulty": 3,
                "test_cases": [{"in": "1", "out": "2"}],
            }
        ],
        [
            {
                "role": "user",
                "content": "2+3?",
                "answer": "5",
                "difficulty": None,
                "test_cases": [],
            }
        ],
    ]
    assert loaded.unused_columns == {path: ("page",)}


def test_in_a_conversation_only_the_last_user_message_has_them(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "difficulty": 1.5}])
    (row,) = load_with(str(path), ["difficulty"]).rows
    assert row["prompt"] == [*messages[:3], {**messages[3], "difficulty": 1.5}]


def test_prompts_stay_the_same_for_keys_splits_and_overlap(path):
    plain, rows = load_with(path, None).rows, load_with(path, COLUMNS).rows
    assert list(map(prompt_key, rows)) == list(map(prompt_key, plain))
    assert indices_of_shared_prompts(rows, plain) == [0, 1]
    held = [split_by_prompt(part, count=1, seed=0)[1][0]["prompt"] for part in (plain, rows)]
    assert held[0][0]["content"] == held[1][0]["content"]


def test_the_summary_says_how_to_pass_columns_on(path):
    advice = "columns not used: page (reward_columns: [NAME, ...] passes columns to rewards)"
    assert load_with(path, COLUMNS).summary() == f"2 of 2 rows; {advice}"
    assert load_with(path, [*COLUMNS, "page"]).summary() == "2 of 2 rows"


def test_the_summary_of_rows_without_rewards_gives_no_such_advice(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "page": 1}])
    assert load(DataSpec(str(path)), "sft", seed=0).summary().endswith("columns not used: page")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_stored_rows_are_the_same(tmp_path, suffix):
    path = str(tmp_path / f"rows{suffix}")
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([ROWS[0], {**ROWS[1], "difficulty": None}]), path)
    else:
        write_rows(tmp_path / "rows.jsonl", ROWS)
    expected = load_with(path, COLUMNS)
    for columns in (None, COLUMNS):  # the two have different entries in the cache
        spec = DataSpec(path, reward_columns=columns)
        stored = load_stored(
            spec, "prompt", seed=None, preparation=DataPreparationSettings(tmp_path / "c", 1)
        )
    assert list(stored.rows) == expected.rows
    assert stored.summary() == expected.summary()


def test_nan_is_null_and_other_types_are_refused(tmp_path):
    cells = {"prompt": ["a", "b"], "x": [1.0, float("nan")], "day": [date(2026, 1, 2)] * 2}
    pq.write_table(pa.table(cells), tmp_path / "a.parquet")
    rows = load_with(str(tmp_path / "a.parquet"), ["x"]).rows
    assert [row["prompt"][0]["x"] for row in rows] == [1.0, None]
    with pytest.raises(UserError, match=r"column 'day' has a value of type date, which JSON"):
        load_with(str(tmp_path / "a.parquet"), ["day"])


def test_every_key_with_a_meaning_is_refused():
    assert {*MESSAGE_KEYS, "weight", "answer", "tests", "tools"} <= RESERVED_KEYS
    for key in RESERVED_KEYS:
        with pytest.raises(UserError, match=rf"data.reward_columns: .*'{key}'") as refusal:
            DataSpec("a.jsonl", reward_columns=[key])
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        (
            ["dificulty"],
            "prompt",
            r"'dificulty', which does not exist; .*you mean 'difficulty'",
        ),
        (["difficulty.x"], "prompt", r"name the whole column 'difficulty', whose value can be an"),
        (["difficulty"], "sft", r"reward_columns has no effect on sft data"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(path, columns, kind, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_with(path, columns, kind)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="'page' is named twice"):
        DataSpec(path, reward_columns=["page", "page"])


def test_rows_of_a_public_format_have_them_too(tmp_path):
    row = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 2.5}
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    loaded = load_with(path, ["score_ratio"])
    assert loaded.schemas == {path: "SHP"}
    assert loaded.rows[0]["prompt"] == [{"role": "user", "content": "Q", "score_ratio": 2.5}]
    loaded = load_with(path, ["score_ratio"], "preference", with_answer_and_tests=True)
    assert loaded.rows[0]["prompt"][0]["score_ratio"] == 2.5
    assert loaded.unused_columns == {}


def test_data_check_counts_them_as_used(path, capsys):
    main(["data", "check", path, "--kind", "prompt"])
    assert "columns not used: difficulty, page, test_cases (reward_col" in capsys.readouterr().out
    main(["data", "check", path, "--kind", "prompt", "--reward_columns", '["difficulty"]'])
    assert "columns not used: page, test_cases (reward_columns" in capsys.readouterr().out


def test_generate_writes_columns_that_score_reads(tmp_path, path, echo_model, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def score(cs): return [float(c[-2]['difficulty'] or 0) for c in cs]\n"
    )
    source = json.dumps([{"path": path, "reward_columns": COLUMNS}])
    arguments = ["--model.path", str(echo_model), "--rollout.max_new_tokens", "2"]
    assert main(["generate", *arguments, "--prompts", source]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["prompt"][0]["content"] for line in lines) == ["2+2?", "2+3?"]
    found = {line["prompt"][0]["content"]: line for line in lines}
    assert found["2+2?"]["difficulty"] == 3
    assert found["2+2?"]["prompt"] == [{"role": "user", "content": "2+2?", "answer": "4"}]
    made = write_rows(tmp_path / "made.jsonl", [found["2+2?"], found["2+3?"]])
    rewards = json.dumps([{"kind": "function", "path": f"{tmp_path}/mine.py:score"}])
    arguments = ["score", "--input", str(made), "--rewards", rewards]
    assert main([*arguments, "--reward_columns", '["difficulty"]']) == 0
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert scores == [3.0, 0.0]
    assert main([*arguments, "--reward_columns", '["role"]']) == 2
    assert "cannot become the key 'role'" in capsys.readouterr().err
