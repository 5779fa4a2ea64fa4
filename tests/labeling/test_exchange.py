"""Labels survive the way to the files of other tools and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlhf.cli.main import main
from rlhf.common.files import write_jsonl
from rlhf.common.text import count_text
from rlhf.config.data import DataSpec
from rlhf.data.labels import label_id_of
from rlhf.data.load import load
from tests.labeling.helpers import (
    good_choice,
    lines,
    open_session,
    pair_rows,
    ranking_rows,
    submit_undo_and_submit,
)
from tests.labeling.helpers import submission as submit_to

ENDINGS = {"argilla": "labels.json", "label-studio": "labels.json", "datasets": "labels.parquet"}


def answers(mode: str, task: Any, number: int) -> dict[str, Any] | None:
    if mode == "pairs":
        return [good_choice(task, 3), {"choice": "tie"}, good_choice(task, 1)][number % 3]
    return {
        "ratings": {"rating": number % 5 + 1},
        "rankings": {"ranks": [2, 3, 1]},
        "demonstrations": {"completion": f"Grüße <{number}>\n\u2028"},
    }[mode]


def label_all(folder: Path, mode: Any) -> Path:
    """Two annotators label all items but one, which they skip; one label is undone."""
    rows = pair_rows(4) if mode == "pairs" else ranking_rows(3)
    for annotator in ("ann", "bob"):
        session = open_session(folder, rows=rows, mode=mode, annotator=annotator)
        session.submit(submit_to(session.next_task(), None))
        task = session.next_task()
        session.submit(submit_to(task, answers(mode, task, 0)))
        session.undo(task.label_id)
        number = 0
        while (task := session.next_task()) is not None:
            session.submit(submit_to(task, answers(mode, task, number), note="“note”", seconds=2.0))
            number += 1
        session._file.close()
    return folder / "labels.jsonl"


def comparable(rows: list[dict[str, Any]], *, with_skipped: bool) -> list[str]:
    """The labels that were not undone, without what a format cannot express."""
    undone = {row.get("undoes") for row in rows}
    keys = {"label_id", "time", "seconds", "shown_first", "shown_order", "strengths", "scale"}
    kept = [
        {key: value for key, value in row.items() if key not in keys}
        for row in rows
        if not row.get("undoes") and row["label_id"] not in undone
    ]
    return sorted(
        json.dumps(row, sort_keys=True) for row in kept if with_skipped or not row.get("skipped")
    )


@pytest.mark.parametrize("mode", ["pairs", "ratings", "rankings", "demonstrations"])
@pytest.mark.parametrize("form", ENDINGS)
def test_labels_return_unchanged(tmp_path: Path, capsys, form: str, mode: str):
    file = label_all(tmp_path / "work", mode)
    exported, back = tmp_path / ENDINGS[form], tmp_path / "back.jsonl"
    command = ["labels", "export", str(file), "--path", str(exported), "--format", form]
    assert main(command) == 0, capsys.readouterr().err
    imported = ["labels", "import", str(exported), "--format", form, "--output", str(back)]
    assert main(imported) == 0, capsys.readouterr().err
    skips = form != "argilla"
    expected = comparable(lines(file), with_skipped=skips)
    assert comparable(lines(back), with_skipped=skips) == expected
    before = back.read_bytes()
    assert main(imported) == 0  # a second import appends nothing
    assert "0 labels appended" in capsys.readouterr().out
    assert back.read_bytes() == before
    assert main(command) == 2
    assert "exists; choose another path or set --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_folder_of_datasets_is_training_data(tmp_path: Path, capsys):
    file = label_all(tmp_path / "work", "pairs")
    folder = tmp_path / "folder"
    words = ["labels", "export", str(file), "--path", str(folder), "--format", "datasets"]
    assert main([*words, "--pseudonyms", "true"]) == 0, capsys.readouterr().err
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder))
    assert set(dataset["annotator"]) == {"A1", "A2"}
    loaded = load(DataSpec(str(folder)), "preference", seed=None)
    assert len(loaded.rows) == 4  # of each annotator: two preferences, a tie and a skipped item
    assert all(row["chosen"][0]["content"].startswith("good") for row in loaded.rows)


def test_pairs_of_a_dataset_become_labels_of_an_annotator(tmp_path: Path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    words = ["labels", "import", str(tmp_path / "pairs.jsonl"), "--format", "datasets"]
    words += ["--output", str(tmp_path / "labels.jsonl")]
    assert main(words) == 2
    assert "set --annotator" in capsys.readouterr().err
    assert main([*words, "--annotator", "crowd"]) == 0
    rows = lines(tmp_path / "labels.jsonl")
    assert [row[f"response_{row['winner']}"][0]["content"] for row in rows] == [
        "good 0",
        "good 1",
        "good 2",
    ]


# What these tools write, with fields and questions of other projects.
ARGILLA = [
    {
        "id": "1",
        "fields": {"question": "Q?", "one": "yes", "two": "no"},
        "metadata": {},
        "suggestions": {},
        "responses": {
            "which": [
                {"value": "two", "user_id": "3f1c7a1e-0000-4000-8000-000000000001"},
                {"value": "tie", "user_id": "3f1c7a1e-0000-4000-8000-000000000002"},
            ]
        },
        "vectors": {},
        "_server_id": None,
    },
    {"id": "2", "fields": {"question": "R?", "one": "a", "two": "b"}, "responses": {}},
    {"id": "3", "fields": {"question": "R?"}, "responses": {"other": [{"value": 1}]}},
    {"id": "4"},
]
LABEL_STUDIO = [
    {
        "id": 7,
        "data": {"question": "Q?", "one": "yes", "two": "no"},
        "annotations": [
            {
                "id": 1001,
                "completed_by": {"id": 5, "email": "ann@example.org"},
                "lead_time": 4.3,
                "was_cancelled": False,
                "created_at": "2026-03-09T21:52:49.513742Z",
                "result": [
                    {
                        "id": "Dx",
                        "from_name": "which",
                        "to_name": "one,two",
                        "type": "pairwise",
                        "value": {"selected": "right"},
                    }
                ],
            },
            {"id": 1002, "completed_by": 6, "result": []},
            {"id": 1003},
        ],
        "predictions": [],
    },
    {"id": 8},
]
NAMES = "{prompt: question, response_a: one, response_b: two, preference: which}"


@pytest.mark.parametrize(
    ("form", "content", "count"), [("argilla", ARGILLA, 2), ("label-studio", LABEL_STUDIO, 1)]
)
def test_files_of_other_projects_are_read(tmp_path: Path, capsys, form, content, count):
    source, labels = tmp_path / "theirs.json", tmp_path / "labels.jsonl"
    source.write_text(json.dumps(content))
    words = ["labels", "import", str(source), "--format", form, "--output", str(labels)]
    assert main([*words, "--names", NAMES]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"{count_text(count, 'label')} appended" in said
    assert "without" in said or "malformed" in said
    row = lines(labels)[0]
    assert row[f"response_{row['winner']}"][0]["content"] == "no"
    if form == "label-studio":
        assert (row["annotator"], row["seconds"]) == ("ann@example.org", 4.3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected the list of argilla records"),
        ("[]", "no label can be read as argilla"),
        ("[1, null, []]", "no label can be read as argilla"),
        ("{", "broken JSON"),
        ('[{"fields": {"prompt": "Q"}, "responses": {"rating": [{"value": 1}]}}]', "no label"),
    ],
)
def test_broken_files_are_one_line(tmp_path: Path, capsys, content: str, message: str):
    source = tmp_path / "theirs.json"
    source.write_text(content)
    for form in ("argilla", "label-studio"):
        words = ["labels", "import", str(source), "--format", form]
        assert main([*words, "--output", str(tmp_path / "labels.jsonl")]) == 2
        errors = capsys.readouterr().err
        assert message.replace("argilla", form) in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "labels.jsonl").exists()


def test_wrong_endings_are_one_line(tmp_path: Path, capsys):
    file = label_all(tmp_path / "work", "pairs")
    for form, name in (("argilla", "x.jsonl"), ("datasets", "x.json")):
        words = ["labels", "export", str(file), "--path", str(tmp_path / name), "--format", form]
        assert main(words) == 2
        assert "must end in" in capsys.readouterr().err


@pytest.mark.parametrize("form", ENDINGS)
def test_check_items_stay_check_items(tmp_path: Path, capsys, form: str):
    """After an export and an import, the answer to a check is not training data."""
    file, back = label_all(tmp_path / "work", "pairs"), tmp_path / "back.jsonl"
    rows = lines(file)
    checked = [row for row in rows if row.get("winner") == "b"][-1]
    write_jsonl(file, [row | {"gold": "a"} if row is checked else row for row in rows])
    exported = str(tmp_path / ENDINGS[form])
    assert main(["labels", "export", str(file), "--path", exported, "--format", form]) == 0
    assert main(["labels", "import", exported, "--format", form, "--output", str(back)]) == 0
    gold = [(row["item_id"], row["annotator"], row["gold"]) for row in lines(back) if "gold" in row]
    assert gold == [(checked["item_id"], checked["annotator"], "a")]
    assert "1 check item" in load(DataSpec(str(back)), "preference", seed=None).summary()


def annotation_of(**values: Any) -> list[dict[str, Any]]:
    """A task of Label Studio with these values of its controls."""
    results = [{"from_name": name, "value": value} for name, value in values.items()]
    return [{"data": {"prompt": "Q"}, "annotations": [{"result": results, "lead_time": "soon"}]}]


def strength_of(value: Any) -> list[dict[str, Any]]:
    """A record of Argilla with this strength."""
    responses = {"preference": "response_b", "strength": value}
    return [
        {
            "fields": {"prompt": "Q", "response_a": "x", "response_b": "y"},
            "responses": {
                name: [{"value": answer, "user_id": "1"}] for name, answer in responses.items()
            },
        }
    ]


def test_texts_of_label_studio_may_be_no_list(tmp_path: Path):
    source, labels = tmp_path / "theirs.json", tmp_path / "labels.jsonl"
    source.write_text(json.dumps(annotation_of(completion={"text": "yes"}, note={"text": "no"})))
    words = ["labels", "import", str(source), "--format", "label-studio", "--output", str(labels)]
    assert main(words) == 0
    (row,) = lines(labels)
    assert (row["completion"][0]["content"], row["note"]) == ("yes", "no")
    assert "seconds" not in row


def test_a_strength_is_a_number(tmp_path: Path, capsys):
    source, labels = tmp_path / "theirs.json", tmp_path / "labels.jsonl"
    words = ["labels", "import", str(source), "--format", "argilla", "--output", str(labels)]
    for value in (float("nan"), -1, [1], "much"):
        source.write_text(json.dumps(strength_of(value)))
        assert main(words) == 2
        assert "strength is" in capsys.readouterr().err
    source.write_text(json.dumps(strength_of("2")))
    assert main(words) == 0
    assert lines(labels)[0]["margin"] == 2


def test_the_annotator_of_a_dataset_of_labels_can_be_changed(tmp_path: Path):
    file, back = label_all(tmp_path / "work", "pairs"), tmp_path / "back.jsonl"
    write_jsonl(file, [row for row in lines(file) if row["annotator"] == "ann"])
    exported = str(tmp_path / "labels.parquet")
    assert main(["labels", "export", str(file), "--path", exported, "--format", "datasets"]) == 0
    words = ["labels", "import", exported, "--format", "datasets", "--output", str(back)]
    assert main([*words, "--annotator", "crowd"]) == 0
    rows = lines(back)
    assert [row["label_id"] for row in rows] == [
        label_id_of("crowd", row["item_id"]) for row in rows
    ]


@pytest.mark.parametrize("form", ENDINGS)
def test_replies_of_several_messages_stay_separate(tmp_path: Path, capsys, form: str):
    def reply(name: str) -> list[dict[str, str]]:
        contents = {"assistant": f"call {name}", "tool": name}
        turns = [{"role": role, "content": text} for role, text in contents.items()]
        return [*turns, {"role": "assistant", "content": f"done {name}"}]

    rows = [{"prompt": "q", "replies": [reply("x"), reply("y")]}]
    session = open_session(tmp_path, rows=rows, mode="rankings")
    session.submit(submit_to(session.next_task(), {"ranks": [1, 2]}))
    session._file.close()
    source, output = str(tmp_path / "labels.jsonl"), str(tmp_path / "imported.jsonl")
    path = str(tmp_path / form) + ENDINGS[form].removeprefix("labels")
    assert main(["labels", "export", source, "--path", path, "--format", form]) == 0
    assert main(["labels", "import", path, "--format", form, "--output", output]) == 0
    assert lines(Path(output))[0]["replies"] == [reply("x"), reply("y")]
    assert lines(Path(output))[0]["item_id"] == lines(Path(source))[0]["item_id"]


def test_a_label_is_imported_once_from_two_formats(tmp_path: Path, capsys):
    """The label replaced an undone one, so only the dataset contains the id of the second one."""
    session = open_session(tmp_path, rows=pair_rows(1))
    submit_undo_and_submit(session, {"choice": "tie"})
    output = str(tmp_path / "imported.jsonl")
    for form in ("datasets", "argilla", "label-studio"):
        path = str(tmp_path / form) + ENDINGS[form].removeprefix("labels")
        source = str(tmp_path / "labels.jsonl")
        assert main(["labels", "export", source, "--path", path, "--format", form]) == 0
        assert main(["labels", "import", path, "--format", form, "--output", output]) == 0
    assert "0 labels appended" in capsys.readouterr().out.splitlines()[-1]
    assert len(lines(Path(output))) == 1


def test_messages_of_a_dataset_have_no_nulls(tmp_path: Path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    called = [{"role": "assistant", "content": "", "tool_calls": calls}]
    rows = [{"prompt": "Q", "chosen": called, "rejected": "no"}, *pair_rows(1)]
    session = open_session(tmp_path / "work", rows=rows)
    while (task := session.next_task()) is not None:
        session.submit(submit_to(task, {"choice": "first"}))
    session._file.close()
    file, back = tmp_path / "work" / "labels.jsonl", tmp_path / "back.jsonl"
    exported = str(tmp_path / "labels.parquet")
    assert main(["labels", "export", str(file), "--path", exported, "--format", "datasets"]) == 0
    words = ["labels", "import", exported, "--format", "datasets", "--output", str(back)]
    assert main(words) == 0
    assert lines(back) == lines(file)


@pytest.mark.parametrize("form", ["argilla", "label-studio"])
def test_messages_that_lose_their_tool_calls_are_counted(tmp_path: Path, capsys, form: str):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    rows = [{"prompt": "Q", "chosen": [{"role": "assistant", "content": "a", "tool_calls": calls}]}]
    session = open_session(tmp_path, rows=[rows[0] | {"rejected": "b"}])
    session.submit(submit_to(session.next_task(), {"choice": "tie"}))
    session._file.close()
    words = ["labels", "export", str(tmp_path / "labels.jsonl"), "--format", form]
    assert main([*words, "--path", str(tmp_path / "out.json")]) == 0
    assert "1 with reasoning or tool calls (exported without them)" in capsys.readouterr().out


def test_only_the_folder_of_a_dataset_is_replaced(tmp_path: Path, capsys):
    file = label_all(tmp_path / "work", "pairs")
    words = ["labels", "export", str(file), "--format", "datasets", "--overwrite", "--path"]
    assert main([*words, str(tmp_path / "work")]) == 2
    assert "is not a dataset of `rlhf labels export`" in capsys.readouterr().err
    assert file.exists()
    own = tmp_path / "own"
    Dataset.from_list([{"mine": 1}]).save_to_disk(own)
    assert main([*words, str(own)]) == 2
    assert (own / "dataset_info.json").is_file()
    for _ in range(2):
        assert main([*words, str(tmp_path / "dataset")]) == 0
    (tmp_path / "dataset" / "notes.txt").write_text("mine")
    assert main([*words, str(tmp_path / "dataset")]) == 2
    assert "notes.txt was added" in capsys.readouterr().err


def test_labels_with_other_ranges_are_not_mixed(tmp_path: Path, capsys):
    """The rating 5 of 5 and the rating 5 of 10 are different answers."""
    for name, scale in (("ann", 5), ("bob", 10)):
        session = open_session(
            tmp_path, mode="ratings", annotator=name, file=f"{name}.jsonl", scale=scale
        )
        session.submit(submit_to(session.next_task(), {"rating": 5}))
        session._file.close()
    ann, bob = (str(tmp_path / name) for name in ("ann.jsonl", "bob.jsonl"))
    exported, before = str(tmp_path / "labels.parquet"), lines(tmp_path / "ann.jsonl")
    assert main(["labels", "export", bob, "--path", exported, "--format", "datasets"]) == 0
    capsys.readouterr()
    both, target = str(tmp_path / "both.json"), ["--output", ann]
    for option, words in (
        ("files", ["agreement", ann, bob]),
        ("files", ["export", ann, bob, "--path", both, "--format", "argilla"]),
        ("output", ["import", exported, "--format", "datasets", *target]),
    ):
        assert main(["labels", *words]) == 2
        errors = capsys.readouterr().err
        assert f"{option}: some labels have scale: 5 and others scale: 10" in errors
        assert errors.count("\n") == 1
    assert lines(tmp_path / "ann.jsonl") == before
    words = ["labels", "export", ann, bob, "--path", str(tmp_path / "both"), "--format", "datasets"]
    assert main(words) == 0  # the column states the range of each label


def test_a_column_that_a_dataset_cannot_store_is_one_line(tmp_path: Path, capsys):
    file = label_all(tmp_path / "work", "pairs")
    rows = lines(file)
    write_jsonl(file, [row | {"mine": i or "text"} for i, row in enumerate(rows)])
    words = ["labels", "export", str(file), "--path", str(tmp_path / "x.parquet")]
    assert main([*words, "--format", "datasets"]) == 2
    errors = capsys.readouterr().err
    assert "a column cannot be stored" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "x.parquet").exists()
