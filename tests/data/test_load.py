"""Sources, mixtures, and one-line error messages."""

import csv
import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.common.files import read_jsonl, write_jsonl
from rlhf.data import DataSpec, load
from rlhf.data.files import read_file
from rlhf.data.load import LoadedRows, mixture_sizes
from rlhf.errors import UserError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]


def prompts(loaded):
    return [row["prompt"][-1]["content"] for row in loaded.rows]


def write(path, rows=ROWS):
    write_jsonl(path, rows)
    return DataSpec(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "Say something",
        "Is 1/2 more than 1/3?",
        "Round 3.5",
        "Hello",
        "a question of several words, " * 20,  # longer than the name of a file can be
        "Is this one line?\nNo.",
    ],
)
def test_a_prompt_in_place_of_a_path_is_recognized(text):
    with pytest.raises(UserError) as error:
        load(DataSpec(text), "prompt", seed=0)
    message = str(error.value)
    assert message.startswith("no data file ")
    assert message.endswith('write it as a row: {"prompt": ...}')
    assert "\n" not in message
    with pytest.raises(UserError) as error:
        load(DataSpec("my rows.jsonl"), "prompt", seed=0)
    assert "prompt" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]
)
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    if "parquet" in name:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        with opener(path, "wt", newline="") as stream:
            if ".jsonl" in name:
                stream.write("\n\n".join(map(json.dumps, ROWS)))
            elif ".json" in name:
                json.dump(ROWS, stream)
            else:
                writer = csv.DictWriter(stream, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(ROWS)
    assert read_file(path) == ROWS
    assert load(DataSpec(str(path)), "sft", seed=1).total == 20


def test_text_files_are_blocks_or_lines(tmp_path):
    blocks, lines = tmp_path / "blocks.txt", tmp_path / "lines.txt"
    blocks.write_text("\nA:\none\n\n \nB:\ntwo\n\n")
    lines.write_text("apple\nbaker\n")
    assert read_file(blocks) == [{"text": "A:\none"}, {"text": "B:\ntwo"}]
    assert read_file(lines) == [{"text": "apple"}, {"text": "baker"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_written_lines_read_back_and_are_reproducible(tmp_path, monkeypatch, name):
    rows = [{"text": "é\u2028\n", "n": 1.5, "x": None}, {"messages": [{"role": "user"}]}]
    assert write_jsonl(tmp_path / "deep" / name, rows) == 2
    assert read_jsonl(tmp_path / "deep" / name) == rows
    later = time.time() + 1000
    monkeypatch.setattr(time, "time", lambda: later)
    write_jsonl(tmp_path / "again" / name, iter(rows))
    assert (tmp_path / "deep" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "x"}'), ("a.csv", "text\nx\n"), ("a.txt", "x")]
)
def test_byte_order_mark_is_ignored(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_file(tmp_path / name) == [{"text": "x"}]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(path, [{"a": 2}, {"a": float("nan")}])
    assert read_jsonl(path) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: expected an object .* list"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json, line 2: broken JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"a\.json, line 2: .*rename it to \.jsonl"),
        ("a.json", '{"a": 1}', r"a\.json: expected a list of objects, found a dict"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json, item 1: expected an object, found int"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv: the header names column 'a' twice"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: the number of fields differs"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv, line 2: the number of fields differs"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv, line 2: broken CSV"),
        ("a.parquet", "not parquet", r"a\.parquet: not a Parquet file"),
        ("a.jsonl.gz", "not gzip", r"a\.jsonl\.gz: damaged gzip"),
        ("a.xlsx", "x", r"a\.xlsx: unknown file format '\.xlsx', use one of \.jsonl"),
        ("a.jsonl", "", r"a\.jsonl: the dataset is empty"),
        (
            "a.jsonl",
            '{"foo": 1, "bar": 2}',
            r"sft data needs messages or prompt \+ completion or text; ",
        ),
        (
            "a.jsonl",
            '{"foo": 1, "bar": 2}',
            r"columns found: bar, foo; map them with data\.columns",
        ),
        ("a.jsonl", '{"prompt": "", "completion": "b"}', r"no usable row \(1 empty prompt\)"),
    ],
)
def test_malformed_content_error_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load(DataSpec(str(tmp_path / name)), "sft", seed=0)
    assert "\n" not in str(caught.value)


def test_truncated_gzip_and_wrong_encoding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, ROWS)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged gzip"):
        read_file(path)
    latin = tmp_path / "b.jsonl"
    latin.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.jsonl: not UTF-8 text"):
        read_file(latin)


def test_identical_pairs_are_named_as_such(tmp_path):
    spec = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}] * 3)
    with pytest.raises(UserError, match="all 3 pairs are identical"):
        load(spec, "preference", seed=0)


def test_missing_files(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"trian\.jsonl.*did you mean 'train\.jsonl'\?"):
        load(DataSpec(str(tmp_path / "trian.jsonl")), "sft", seed=0)
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        load(DataSpec(str(tmp_path / "nowhere" / "a.jsonl")), "sft", seed=0)
    with pytest.raises(UserError, match="hub id has the form org/name"):
        load(DataSpec("imdb"), "text", seed=0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "promt"},
            r"names column 'promt', which does not exist; .*mean 'prompt'",
        ),
        ({"rejected": "completion"}, r"data\.columns\.rejected is not a field of sft data"),
    ],
)
def test_mappings_that_cannot_work(tmp_path, columns, message):
    spec = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=message):
        load(DataSpec(spec.path, columns=columns), "sft", seed=0)


def test_kept_columns_must_exist_and_not_collide(tmp_path):
    spec = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="no column 'annotator' to keep"):
        load(spec, "sft", seed=0, keep=("annotator",))
    with pytest.raises(UserError, match="'completion' cannot be kept"):
        load(spec, "prompt", seed=0, keep=("completion",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": " "}, "path is empty"),
        ({"path": "a", "limit": 0}, "limit must be >= 1"),
        ({"path": "a", "weight": 0.0}, "weight must be > 0"),
        ({"path": "a", "weight": float("inf")}, "weight must be a finite number"),
        ({"path": "a", "split": ""}, "split is empty"),
        ({"path": "a", "columns": {"promt": "q"}}, "did you mean 'prompt'"),
    ],
)
def test_spec_rejects_contradictory_settings(fields, message):
    with pytest.raises(UserError, match=message):
        DataSpec(**fields)


def test_shuffle_depends_only_on_the_seed(tmp_path):
    spec = write(tmp_path / "a.jsonl")
    first, again, other = (prompts(load(spec, "sft", seed=s)) for s in (1, 1, 2))
    assert first == again
    assert sorted(first) == sorted(other)
    assert first != other
    assert first != [row["prompt"] for row in ROWS]


def test_without_a_seed_the_order_is_that_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"prompt": f"p{i}", "completion": "c"} for i in range(50)])
    rows = load([DataSpec(str(path)), DataSpec(str(path), limit=2)], "sft", seed=None).rows
    texts = [row["prompt"][0]["content"] for row in rows]
    assert texts == [*(f"p{i}" for i in range(50)), "p0", "p1"]


def test_limit_is_the_start_of_the_shuffle_and_counts_usable_rows(tmp_path):
    spec = write(tmp_path / "a.jsonl", ROWS + [{"prompt": "", "completion": "x"}] * 20)
    everything = load(spec, "sft", seed=3)
    limited = load(DataSpec(spec.path, limit=5), "sft", seed=3)
    assert prompts(limited) == prompts(everything)[:5]
    assert limited.total == 40
    assert limited.unused == 40 - 5 - sum(limited.dropped.values())
    assert f"{limited.unused} unused" in limited.summary()


@pytest.mark.parametrize(
    ("available", "weights", "sizes"),
    [
        ([100, 50], [None, None], [100, 50]),
        ([100, 50], [1.0, 1.0], [50, 50]),
        ([100, 50], [3.0, 1.0], [100, 33]),
        ([100, 50], [1.0, 3.0], [17, 50]),
        ([100, 50, 10], [0.5, 0.3, 0.2], [25, 15, 10]),
        ([1000, 3], [1.0, 1000.0], [1, 3]),
        ([7], [2.0], [7]),
    ],
)
def test_mixture_sizes(available, weights, sizes):
    assert mixture_sizes(available, weights) == sizes


def test_mixture_has_exact_counts_and_no_row_twice(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        rows = [{"prompt": f"{path.stem}{i}", "completion": "x"} for i in range(30)]
        write(path, rows)
    specs = [DataSpec(str(p), weight=w) for p, w in zip(paths, (2.0, 1.0), strict=True)]
    mixed = load(specs, "sft", seed=0)
    names = prompts(mixed)
    assert Counter(name[0] for name in names) == {"a": 30, "b": 15}
    assert len(set(names)) == 45
    assert mixed.sources == {str(paths[0]): 30, str(paths[1]): 15}
    assert (mixed.total, mixed.unused) == (60, 15)
    assert names == prompts(load(specs, "sft", seed=0))
    assert [name[0] for name in names] != sorted(name[0] for name in names)
    assert mixed.summary().endswith(f"; {paths[0]} 30, {paths[1]} 15")


def test_weights_for_some_sources_only_are_refused(tmp_path):
    spec = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="for all or for none"):
        load([spec, DataSpec(spec.path, weight=1.0)], "sft", seed=0)
    with pytest.raises(UserError, match="at least one path"):
        load([], "sft", seed=0)


def test_the_first_dropped_row_of_each_reason_is_named(tmp_path):
    bad = [{"prompt": "", "completion": "x"}, {"prompt": "x", "completion": ""}]
    one = write(tmp_path / "one.jsonl", [*ROWS, bad[0], *ROWS, bad[0]])
    two = write(tmp_path / "two.jsonl", [bad[1], bad[0], *ROWS])
    for seed in range(6):  # whichever of rows 21 and 42 the shuffle meets first
        loaded = load([one, two], "sft", seed=seed)
        assert loaded.dropped == {"empty prompt": 3, "empty reply": 1}
        assert loaded.first_dropped == {
            "empty prompt": f"{one.path}, row 21",
            "empty reply": f"{two.path}, row 1",
        }


def test_summary_names_the_reasons():
    loaded = LoadedRows(rows=[{}] * 7, dropped={"empty reply": 2, "repeated role": 1}, total=10)
    assert loaded.summary() == "7 of 10 rows; dropped 3: 2 empty reply, 1 repeated role"


@pytest.fixture
def quiet_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_folders_go_through_datasets(tmp_path, quiet_hub):
    folder = tmp_path / "folder"
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", ROWS[:3])
    assert load(DataSpec(str(folder), split="test"), "sft", seed=0).total == 3
    assert load(DataSpec(str(folder)), "sft", seed=0).total == 20
    with pytest.raises(UserError, match=r"Unknown split .*valid"):
        load(DataSpec(str(folder), split="valid"), "sft", seed=0)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"data folder .*void"):
        load(DataSpec(str(tmp_path / "void")), "sft", seed=0)


def test_saved_data_sets_are_read(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "two")
    assert load(DataSpec(str(tmp_path / "one")), "sft", seed=0).total == 20
    assert load(DataSpec(str(tmp_path / "two"), split="test"), "sft", seed=0).total == 1


def test_parquet_files_and_saved_data_sets_hold_what_json_lines_hold(tmp_path):
    """A columnar file gives every object of a column the keys of all; pyarrow fills in nulls."""
    rows = []
    for arguments in ({"city": "Oslo"}, {"amount": 3}):
        keys = {key: {"type": "string"} for key in arguments}
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": "1", "type": "function", "function": function}]
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": calls}]
        schema = {"name": "f", "parameters": {"type": "object", "properties": keys}}
        rows.append({"messages": turns, "tools": [{"type": "function", "function": schema}]})
    write(tmp_path / "a.jsonl", rows)
    expected = load(DataSpec(str(tmp_path / "a.jsonl")), "sft", seed=None).rows
    table = pa.Table.from_pylist(rows)
    assert "amount" in table.to_pylist()[0]["tools"][0]["function"]["parameters"]["properties"]
    (tmp_path / "folder").mkdir()
    for name in ("a.parquet", "folder/train.parquet"):
        pq.write_table(table, tmp_path / name)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "folder", "saved"):
        found = load(DataSpec(str(tmp_path / name)), "sft", seed=None).rows
        assert [{**row, "source": ""} for row in found] == [{**r, "source": ""} for r in expected]


def test_decimals_are_numbers(tmp_path):
    cells = {"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}
    decimals = pa.array([Decimal("1.50")], pa.decimal128(5, 2))
    pq.write_table(pa.table(cells | {"margin": decimals}), tmp_path / "a.parquet")
    assert (
        load(DataSpec(str(tmp_path / "a.parquet")), "preference", seed=0).rows[0]["margin"] == 1.5
    )
    pq.write_table(pa.table({"prompt": ["p"], "answer": decimals}), tmp_path / "b.parquet")
    row = load(DataSpec(str(tmp_path / "b.parquet")), "prompt", seed=0).rows[0]
    assert row["prompt"][0]["answer"] == "1.5"


def test_a_folder_of_csv_files_is_read_like_the_file(tmp_path, quiet_hub):
    file = tmp_path / "folder" / "train.csv"
    file.parent.mkdir()
    file.write_text("prompt,answer\nNA,007\nnull,1.50\n3,true\n")
    for path in (file, file.parent):
        rows = load(DataSpec(str(path)), "prompt", seed=None).rows
        (turns,) = zip(*(row["prompt"] for row in rows), strict=True)
        found = [(turn["content"], turn["answer"]) for turn in turns]
        assert found == [("NA", "007"), ("null", "1.50"), ("3", "true")]


def test_hub_ids_reach_load_dataset_with_every_setting(monkeypatch):
    calls = []

    def fake(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    spec = DataSpec("org/name", name="config", data_dir="part", split="test[:10%]")
    assert sorted(prompts(load(spec, "sft", seed=0))) == sorted(row["prompt"] for row in ROWS)
    assert calls == [(("org/name", "config"), {"data_dir": "part", "split": "test[:10%]"})]


def test_unreachable_hub_says_how_to_use_a_local_file(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"'org/name' .*set data.path to a local") as caught:
        load(DataSpec("org/name"), "sft", seed=0)
    assert "\n" not in str(caught.value)


def test_a_local_file_wins_over_a_hub_id_of_the_same_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "data.jsonl")
    assert load(DataSpec("org/data.jsonl"), "sft", seed=0).total == 20


def test_import_is_light():
    code = (
        "import sys, rlhf.data; print(sorted({'torch', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
