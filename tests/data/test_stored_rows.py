"""Rows on the disk are those of `load`: same rows, order, split and counts; their cache."""

import csv
import errno
import gzip
import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.common.files import json_line, write_jsonl
from rlhf.config.data import DataSpec
from rlhf.data import load, row_store, split_by_prompt, stored_rows
from rlhf.data.cache import cached_entry
from rlhf.data.leakage import indices_of_shared_prompts
from rlhf.data.stored_rows import (
    DataPreparationSettings,
    count_shared_prompts,
    load_stored,
    split_stored_by_prompt,
)
from rlhf.data.stream import RowStream, StreamPosition
from rlhf.errors import UserError
from tests.fuzz.rows import mutated_rows

TEXTS = ("", "apple", "two words", "line\u2028break", "é\u0301 \ud83d\ude00", "7")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that every table has several."""
    monkeypatch.setattr(row_store, "BLOCK_ROWS", 7)


@pytest.fixture
def prepared(tmp_path):
    return DataPreparationSettings(tmp_path / "cache", processes=1)


def ragged(seed: int, count: int) -> list[dict]:
    """Rows with several sets of columns, types and mistakes; some prompts are repeated."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        prompt = generator.choice([f"p{index}", f"p{index % 5}", *TEXTS])
        reply = generator.choice(TEXTS)
        rows.append(
            generator.choice(
                [
                    {"prompt": prompt, "completion": reply},
                    {"prompt": prompt, "completion": reply, "system": "Be kind.", "id": index},
                    {"prompt": prompt, "completion": None, "note": [1, "x"]},
                    {"prompt": 3, "completion": reply},
                    {
                        "messages": [
                            {"role": "user", "content": prompt, "mood": generator.choice(TEXTS)},
                            {"role": generator.choice(["assistant", "user"]), "content": reply},
                        ]
                    },
                    {
                        "messages": [
                            {"role": "user", "content": prompt},
                            {
                                "role": "assistant",
                                "content": None,
                                "tool_calls": [{"name": "f", "arguments": {"x": [1, 0.5, None]}}],
                            },
                        ],
                        "tools": '[{"name": "f", "parameters": {}}]',
                    },
                ]
            )
        )
    return rows


def write_lines(path: Path, rows: list[dict], generator: random.Random) -> Path:
    """JSON lines with blank lines between them."""
    blank = ["", "\n", "  \n", "\u2028\n"]
    text = "".join(generator.choice(blank) + json_line(row) for row in rows)
    if generator.random() < 0.5:
        text = "\ufeff" + text.removesuffix("\n")
    path.write_text(text, encoding="utf-8")
    return path


def check_same(specs, kind, seed, preparation, **options) -> Any:
    """Load in both ways; return both results after a comparison, or None after equal errors."""
    try:
        expected = load(specs, kind, seed=seed, **options)
    except UserError as error:
        with pytest.raises(UserError, match=f"^{re.escape(str(error))}$"):
            load_stored(specs, kind, seed=seed, preparation=preparation, **options)
        return None
    found = load_stored(specs, kind, seed=seed, preparation=preparation, **options)
    assert list(found.rows) == expected.rows
    assert [list(row) for row in found.rows] == [list(row) for row in expected.rows]
    assert list(found.dropped.items()) == list(expected.dropped.items())
    for name in ("total", "unused", "sources", "first_dropped", "unused_columns", "ignored"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.schemas == expected.schemas
    return expected, found


@pytest.mark.parametrize("seed", range(6))
def test_ragged_lines_give_the_rows_of_load(tmp_path, prepared, seed):
    path = write_lines(tmp_path / "a.jsonl", ragged(seed, 60), random.Random(seed))
    for order in (None, 0, seed):
        check_same(DataSpec(str(path)), "sft", order, prepared)
    for limit in (1, 5, 1000):
        check_same(DataSpec(str(path), limit=limit), "sft", seed, prepared)
    assert len(list((tmp_path / "cache").glob("rows-*"))) < 12


@pytest.mark.parametrize("seed", range(4))
def test_a_limit_that_the_first_rows_do_not_reach(tmp_path, prepared, seed, monkeypatch):
    monkeypatch.setattr(stored_rows, "_LIMIT_FACTOR", 1)
    monkeypatch.setattr(stored_rows, "_LIMIT_EXTRA", 1)
    path = write_lines(tmp_path / "a.jsonl", ragged(seed, 60), random.Random(seed))
    for limit in (1, 2, 10, 20):
        check_same(DataSpec(str(path), limit=limit), "sft", seed, prepared)


@pytest.mark.parametrize("seed", range(4))
def test_mixtures_give_the_rows_of_load(tmp_path, prepared, seed):
    generator = random.Random(seed)
    paths = [
        write_lines(tmp_path / f"{i}.jsonl", ragged(10 * seed + i, 20 + 30 * i), generator)
        for i in range(3)
    ]
    for weights in ((None,) * 3, (1.0, 2.0, 0.5)):
        specs = [
            DataSpec(str(path), weight=weight, limit=limit, system=system)
            for path, weight, limit, system in zip(
                paths, weights, (None, 30, 8), (None, "Be brief.", None), strict=True
            )
        ]
        check_same(specs, "sft", seed, prepared)
    with pytest.raises(UserError, match="for some sources only"):
        load_stored(
            [DataSpec(str(paths[0]), weight=1.0), DataSpec(str(paths[1]))],
            "sft",
            seed=0,
            preparation=prepared,
        )


def test_mutated_rows_of_every_kind_give_the_rows_of_load(tmp_path, prepared):
    generator = random.Random(5)
    compared = 0
    for number in range(300):
        case = mutated_rows(generator)
        path = tmp_path / f"{number}.jsonl"
        lines = [json_line({str(k): v for k, v in row.items()}) for row in case["rows"]]
        path.write_text("".join(lines), encoding="utf-8")
        spec = DataSpec(str(path), **case["spec"])
        compared += check_same(spec, case["kind"], number % 3, prepared) is not None
    assert compared > 60


HELPSTEER = [
    {"prompt": f"p{i % 9}", "response": f"r{i}", "helpfulness": i * 7 % 5, "correctness": 1}
    for i in range(40)
]
NECTAR = [
    {"prompt": f"p{i}", "answers": [{"answer": f"a{k}", "rank": k + 1} for k in range(i % 4 + 1)]}
    for i in range(20)
]
MESSAGES = [
    {
        "message_id": i,
        "parent_id": (i - 1) // 2 if i else None,
        "text": f"t{i}",
        "role": "prompter" if (i + 1).bit_length() % 2 else "assistant",
        "rank": i % 2,
        "deleted": i == 9,
    }
    for i in range(31)
]


@pytest.mark.parametrize("kind", ["preference", "ranking", "prompt", "sft"])
@pytest.mark.parametrize(
    "rows", [HELPSTEER, NECTAR, MESSAGES], ids=["helpsteer", "nectar", "oasst"]
)
@pytest.mark.parametrize("limit", [None, 3])
def test_schemas_give_the_rows_of_load(tmp_path, prepared, kind, rows, limit):
    write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in (0, 1):
        check_same(DataSpec(str(tmp_path / "a.jsonl"), limit=limit), kind, seed, prepared)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet", "a.txt"]
)
def test_every_format_gives_the_rows_of_load(tmp_path, prepared, name):
    rows = [{"prompt": f"p{i}", "completion": "x" * (i % 3), "id": str(i)} for i in range(30)]
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    if name == "a.parquet":
        nested = [row | {"tools": [{"name": "f", "strict": None}], "n": 1.5} for row in rows]
        pq.write_table(pa.Table.from_pylist(nested), path, row_group_size=11)
    elif name == "a.txt":
        path.write_text("\n".join(row["prompt"] for row in rows))
    else:
        with opener(path, "wt", newline="") as stream:
            if ".csv" in name:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            elif ".jsonl" in name:
                stream.writelines(map(json_line, rows))
            else:
                json.dump(rows, stream)
    kind = "text" if name == "a.txt" else "sft"
    assert check_same(DataSpec(str(path)), kind, 1, prepared) is not None


@pytest.mark.parametrize("limit", [None, 2])
def test_arrow_types_that_cannot_be_taken_by_index_give_the_rows_of_load(
    tmp_path, prepared, limit, monkeypatch
):
    monkeypatch.setattr(stored_rows, "_LIMIT_EXTRA", 3)
    texts = pa.array([f"p{i}" for i in range(40)], pa.string_view())
    table = pa.table({"prompt": texts, "completion": texts, "n": pa.array(range(40))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    spec = DataSpec(str(tmp_path / "a.parquet"), limit=limit)
    for seed in (None, 0, 1):
        assert check_same(spec, "sft", seed, prepared, keep=("n",)) is not None


@pytest.mark.parametrize("harm", ["text", "page"])
def test_a_damaged_parquet_file_is_one_line(tmp_path, prepared, harm):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"abcdefgh" * 9, b"\xff" if harm == "text" else b"x"]).view(pa.string())
    pq.write_table(pa.table({"prompt": texts, "completion": texts}), path)
    if harm == "page":
        path.write_bytes(path.read_bytes()[:10] + b"\0" * 40 + path.read_bytes()[50:])
    message = "not UTF-8 text" if harm == "text" else "damaged Parquet file"
    with pytest.raises(UserError, match=f"a.parquet: {message}"):
        load(DataSpec(str(path)), "sft", seed=0)
    assert check_same(DataSpec(str(path)), "sft", 0, prepared) is None
    with pytest.raises(UserError, match=f"a.parquet: {message}"):
        list(RowStream(DataSpec(str(path), streaming=True), 8).blocks(StreamPosition()))


def test_folders_of_datasets_give_the_rows_of_load(tmp_path, prepared):
    rows = [{"prompt": f"p{i}", "completion": "x" * (i % 3)} for i in range(30)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert check_same(DataSpec(str(tmp_path / "saved")), "sft", 1, prepared) is not None


def test_values_without_a_form_in_json_are_not_stored(tmp_path, prepared):
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "when": [b"x", b"y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    spec = DataSpec(str(tmp_path / "a.parquet"))
    assert check_same(spec, "sft", 0, prepared) is not None  # the column is not used
    with pytest.raises(row_store.Unstorable):
        load_stored(spec, "sft", seed=0, preparation=prepared, keep=("when",))
    assert load(spec, "sft", seed=None, keep=("when",)).rows[0]["when"] == b"x"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"a": \n'),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n[1]\n'),
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.jsonl", '{"foo": 1}'),
        ("a.jsonl", '{"prompt": "", "completion": "b"}'),
        ("a.jsonl", '{"prompt": "q", "response_a": "x", "response_b": "y", "winner": 2}'),
        ("a.csv", "a,b,a\n1,2,3\n"),
        ("a.csv", "a,b\n1,2\n3\n"),
        ("a.csv", 'a,b\n1,"2\n'),
        ("a.parquet", "not parquet"),
        ("a.jsonl.gz", "not gzip"),
        ("a.xlsx", "x"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_errors_are_those_of_load(tmp_path, prepared, name, content, kind):
    (tmp_path / name).write_text(content)
    assert check_same(DataSpec(str(tmp_path / name)), kind, 0, prepared) is None


def test_text_in_another_encoding_is_refused(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.jsonl: not UTF-8 text .* at byte 10\)"):
        load_stored(DataSpec(str(tmp_path / "a.jsonl")), "sft", seed=0, preparation=prepared)


@pytest.mark.parametrize("seed", range(5))
def test_the_split_is_that_of_rows_in_memory(tmp_path, prepared, seed):
    generator = random.Random(seed)
    rows = [
        {"prompt": f"p {generator.randrange(30)}", "completion": str(i)}
        for i in range(generator.randrange(40, 90))
    ]
    path = write_lines(tmp_path / "a.jsonl", rows, generator)
    expected, found = check_same(DataSpec(str(path)), "sft", seed, prepared)
    for fraction in (0.01, 0.1, 0.5, 0.9):
        train, held = split_by_prompt(expected.rows, fraction=fraction, seed=seed)
        found_train, found_held = split_stored_by_prompt(found.rows, fraction=fraction, seed=seed)
        assert (list(found_train), list(found_held)) == (train, held)
        assert count_shared_prompts(found_held, found_train) == 0
        for part, against in ((found.rows, held), (expected.rows, found_held)):
            shared = indices_of_shared_prompts(expected.rows, held)
            assert count_shared_prompts(part, against) == len(shared) >= len(held)


def test_one_prompt_cannot_be_split(tmp_path, prepared):
    rows = [{"prompt": "p", "completion": str(i)} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    expected, found = check_same(DataSpec(str(tmp_path / "a.jsonl")), "sft", 0, prepared)
    with pytest.raises(UserError) as first:
        split_by_prompt(expected.rows, fraction=0.5, seed=0)
    with pytest.raises(UserError) as second:
        split_stored_by_prompt(found.rows, fraction=0.5, seed=0)
    assert str(first.value) == str(second.value)


def test_rows_are_a_sequence(tmp_path, prepared):
    write_jsonl(tmp_path / "a.jsonl", HELPSTEER)
    expected, found = check_same(DataSpec(str(tmp_path / "a.jsonl")), "sft", 0, prepared)
    assert found.rows[3] == expected.rows[3]
    assert list(found.rows[5:9]) == expected.rows[5:9]
    assert found.rows[len(expected.rows) - 1] == expected.rows[-1]
    assert found.rows[-1] == expected.rows[-1]


def test_worker_processes_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(row_store, "ROWS_PER_PROCESS", 20)
    path = write_lines(tmp_path / "a.jsonl", ragged(3, 100), random.Random(3))
    expected = load(DataSpec(str(path)), "sft", seed=1)
    found = load_stored(
        DataSpec(str(path)),
        "sft",
        seed=1,
        preparation=DataPreparationSettings(tmp_path / "cache", processes=2),
    )
    assert list(found.rows) == expected.rows
    assert found.summary() == expected.summary()


# -- the cache --------------------------------------------------------------------------------


def count_builds(monkeypatch) -> list[Path]:
    built = []
    original = stored_rows.build_row_store

    def build(folder, *arguments, **options):
        built.append(folder)
        original(folder, *arguments, **options)

    monkeypatch.setattr(stored_rows, "build_row_store", build)
    return built


def test_rows_are_prepared_once_for_all_seeds(tmp_path, prepared, monkeypatch):
    built = count_builds(monkeypatch)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, HELPSTEER)
    for seed in (0, 1, 2):
        check_same(DataSpec(str(path)), "sft", seed, prepared)
    assert len(built) == 1
    check_same(DataSpec(str(path), weight=2.0), "sft", 0, prepared)
    assert len(built) == 1
    check_same(DataSpec(str(path), system="Be kind."), "sft", 0, prepared)
    check_same(DataSpec(str(path)), "preference", 0, prepared)
    assert len(built) == 3
    content = path.read_bytes()
    path.write_bytes(content.replace(b"r7", b"r8"))  # of the same size
    check_same(DataSpec(str(path)), "sft", 0, prepared)
    assert len(built) == 4
    path.write_bytes(content)
    check_same(DataSpec(str(path)), "sft", 0, prepared)
    assert len(built) == 4


@pytest.mark.parametrize("harm", ["change", "remove", "truncate"])
def test_a_damaged_entry_is_prepared_again(tmp_path, prepared, monkeypatch, caplog, harm):
    built = count_builds(monkeypatch)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, HELPSTEER)
    check_same(DataSpec(str(path)), "sft", 0, prepared)
    (file,) = (tmp_path / "cache").glob("rows-*/rows.arrow")
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    elif harm == "truncate":
        file.write_bytes(content[:-40])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    check_same(DataSpec(str(path)), "sft", 0, prepared)
    assert len(built) == 2
    assert "the data are prepared again" in caplog.text


def test_a_killed_process_leaves_no_entry(tmp_path):
    target = tmp_path / "cache" / "rows-0"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom rlhf.data.cache import cached_entry\n"
        "def build(folder):\n (folder / 'a').write_text('half')\n os.kill(os.getpid(), 9)\n"
        "cached_entry(Path(sys.argv[1]), build)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == -9
    assert not target.exists()

    def build(folder):
        (folder / "a").write_text("whole")

    cached_entry(target, build)
    assert (target / "a").read_text() == "whole"
    assert sorted(p.name for p in target.parent.iterdir()) == [".rows-0.lock", "rows-0"]


def test_simultaneous_processes_prepare_once(tmp_path):
    built, started = [], threading.Event()

    def build(folder):
        started.set()
        built.append(folder)
        (folder / "a").write_text("whole")

    target = tmp_path / "rows-0"
    threads = [threading.Thread(target=cached_entry, args=(target, build)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data_cache: .*/file cannot be written"):
        cached_entry(tmp_path / "file" / "rows-x", lambda folder: None)


def test_an_entry_is_written_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    target = tmp_path / "rows-x"
    cached_entry(target, lambda folder: (folder / "rows").touch())
    assert (target / "rows").exists()
