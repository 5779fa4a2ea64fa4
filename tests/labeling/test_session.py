"""Labels are saved exactly once, blind, and as training data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.config.labeling import check_annotator
from rlhf.data.labels import label_id_of, labels_not_undone
from rlhf.data.load import load
from rlhf.errors import UserError
from rlhf.labeling.items import read_check_items, read_items
from rlhf.labeling.pseudonyms import pseudonym_of, with_numbered_annotators
from rlhf.labeling.session import (
    ConflictingLabel,
    InvalidLabel,
    LabelingSession,
    LabelSettings,
)
from rlhf.labeling.store import LabelFile
from tests.labeling.helpers import (
    good_choice,
    lines,
    open_session,
    pair_rows,
    ranking_rows,
    shown,
    submission,
    submit_undo_and_submit,
)


def test_labels_of_pairs_are_training_data(tmp_path: Path):
    session = open_session(tmp_path)
    for strength in (1, 2, 3):
        task = session.next_task()
        session.submit(submission(task, good_choice(task, strength), note=" why ", seconds=1.234))
    session.submit(submission(session.next_task(), {"choice": "tie"}))
    assert session.next_task() is None
    rows = lines(tmp_path / "labels.jsonl")
    assert [row["margin"] for row in rows] == [1, 2, 3, 0]
    assert rows[0]["note"] == "why"
    assert rows[0]["seconds"] == 1.2
    loaded = load(DataSpec(str(tmp_path / "labels.jsonl")), "preference", seed=None)
    pairs = [
        (r["prompt"][0]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"])
        for r in loaded.rows
    ]
    assert pairs == [(f"Question {i}?", f"good {i}", f"bad {i}") for i in range(3)]
    assert [row["margin"] for row in loaded.rows] == [1.0, 2.0, 3.0]
    assert loaded.dropped == {"tie": 1}
    assert loaded.schemas == {str(tmp_path / "labels.jsonl"): "labels of mode pairs"}
    assert "note" in loaded.summary()  # named as a column that is not used


def test_undone_skipped_and_check_labels_are_dropped_and_counted(tmp_path: Path):
    session = open_session(tmp_path)
    task = session.next_task()
    session.submit(submission(task, {"choice": "tie"}))
    session.undo(task.label_id)
    again = session.next_task()
    assert again.item == task.item  # an undone item comes first
    assert again.label_id != task.label_id
    assert again.reply_order == task.reply_order
    session.submit(submission(again, good_choice(again)))
    session.submit(submission(session.next_task(), None))
    progress = session.progress()
    assert (progress.labeled, progress.skipped, progress.total) == (1, 1, 4)
    loaded = load(DataSpec(str(tmp_path / "labels.jsonl")), "preference", seed=0)
    assert len(loaded.rows) == 1
    assert loaded.dropped == {"undone label": 1, "skipped item": 1}


def test_the_order_is_random_and_says_nothing(tmp_path: Path):
    session = open_session(tmp_path, rows=pair_rows(200))
    first = Counter()
    while (task := session.next_task()) is not None:
        first[shown(task)[0].split()[0]] += 1
        session.submit(submission(task, {"choice": "first", "strength": 1}))
    assert 70 <= first["good"] <= 130  # 4 standard deviations
    winners = Counter(row["winner"] for row in lines(tmp_path / "labels.jsonl"))
    assert 70 <= winners["a"] <= 130
    other = open_session(tmp_path, rows=pair_rows(200), annotator="other", file="other.jsonl")
    orders = {
        task.item.item_id: task.reply_order for task in map(session._task, session._items.values())
    }
    theirs = {
        task.item.item_id: task.reply_order for task in map(other._task, other._items.values())
    }
    assert 70 <= sum(orders[item] == theirs[item] for item in orders) <= 130


def test_a_repeated_submission_changes_nothing(tmp_path: Path):
    session = open_session(tmp_path)
    task = session.next_task()
    answer = submission(task, good_choice(task), seconds=1)
    assert session.submit(answer) == task.label_id
    before = (tmp_path / "labels.jsonl").read_bytes()
    assert session.submit(answer) == task.label_id
    assert session.submit(submission(task, good_choice(task), seconds=9)) == task.label_id
    with pytest.raises(ConflictingLabel, match="different label"):
        session.submit(submission(task, {"choice": "tie"}))
    with pytest.raises(ConflictingLabel, match="different label"):
        session.submit(submission(task, None))
    assert session.undo(task.label_id) == session.undo(task.label_id)
    undone = (tmp_path / "labels.jsonl").read_bytes()
    assert undone.startswith(before)
    assert undone.count(b"\n") == 2
    with pytest.raises(ConflictingLabel, match="was undone"):  # it is not saved any more
        session.submit(answer)
    assert (tmp_path / "labels.jsonl").read_bytes() == undone
    assert session.progress().labeled == 0


def test_an_answer_to_a_page_with_other_settings_is_refused(tmp_path: Path):
    """Another seed changes the order of the replies, so "first" would mean the other reply."""
    old = open_session(tmp_path, seed=0)
    outdated = submission(old.next_task(), {"choice": "first"}, settings_id=old.settings.id)
    old._file.close()
    for changed in ({"seed": 1}, {"strengths": 2}, {"scale": 10}):
        session = open_session(tmp_path, **changed)
        with pytest.raises(ConflictingLabel, match="reload the page"):
            session.submit(outdated)
        session._file.close()
    assert lines(tmp_path / "labels.jsonl") == []


def test_a_repetition_for_another_item_is_refused(tmp_path: Path):
    session = open_session(tmp_path)
    first = session.next_task()
    session.submit(submission(first, None))
    other = session.next_task().item.item_id
    with pytest.raises(ConflictingLabel):
        session.submit(type(submission(first, None))(first.label_id, other, None))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_deleted_or_replaced_takes_no_label(tmp_path: Path, replaced: bool):
    """A row in a file without a name would be lost at the end of the process."""
    session = open_session(tmp_path)
    task, path = session.next_task(), tmp_path / "labels.jsonl"
    if replaced:
        (tmp_path / "new").write_text("")
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match="deleted or replaced"):
        session.submit(submission(task, None))
    assert session.progress().skipped == 0


def test_threads_that_submit_the_same_label_save_it_once(tmp_path: Path):
    session = open_session(tmp_path)
    task = session.next_task()
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(session.submit(submission(task, good_choice(task))))
        )
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [task.label_id] * 16
    assert len(lines(tmp_path / "labels.jsonl")) == 1


@pytest.mark.parametrize(
    ("mode", "answer", "message"),
    [
        ("pairs", {"choice": "third"}, "choice must be"),
        ("pairs", {"choice": "first", "strength": 4}, "from 1 to 3"),
        ("pairs", {"choice": "first", "strength": True}, "from 1 to 3"),
        ("pairs", {"choice": "first", "strength": 1.5}, "from 1 to 3"),
        ("pairs", {}, "choice must be"),
        ("ratings", {"rating": 0}, "from 1 to 5"),
        ("ratings", {"rating": "5"}, "from 1 to 5"),
        ("rankings", {"ranks": [1, 2]}, "3 whole numbers"),
        ("rankings", {"ranks": [1, 2, 4]}, "3 whole numbers"),
        ("rankings", {"ranks": "123"}, "3 whole numbers"),
        ("demonstrations", {"completion": "  "}, "empty"),
        ("demonstrations", {"completion": 3}, "must be a text"),
        ("demonstrations", {"completion": "\ud800"}, "broken Unicode"),
        ("demonstrations", {"completion": "x" * 200_001}, "at most"),
    ],
)
def test_impossible_answers_are_refused(tmp_path: Path, mode, answer, message):
    session = open_session(tmp_path, rows=ranking_rows(2), mode=mode)
    with pytest.raises(InvalidLabel, match=message):
        session.submit(submission(session.next_task(), answer))
    assert lines(tmp_path / "labels.jsonl") == []


def test_labels_of_foreign_items_and_old_states_are_refused(tmp_path: Path):
    session = open_session(tmp_path)
    task = session.next_task()
    foreign = submission(task, good_choice(task))
    with pytest.raises(InvalidLabel, match="not in this queue"):
        session.submit(type(foreign)("x", "unknown", foreign.answer))
    with pytest.raises(ConflictingLabel, match="older state"):
        session.submit(type(foreign)("x", task.item.item_id, foreign.answer))
    with pytest.raises(InvalidLabel, match="no such label"):
        session.undo("x")


def test_rankings_keep_the_order_and_give_pairs(tmp_path: Path):
    session = open_session(tmp_path, rows=ranking_rows(2), mode="rankings")
    task = session.next_task()
    order = shown(task)
    session.submit(submission(task, {"ranks": [2, 3, 1]}))
    task = session.next_task()
    session.submit(submission(task, {"ranks": [1, 1, 2]}))
    path = DataSpec(str(tmp_path / "labels.jsonl"))
    ranking = load(path, "ranking", seed=None)
    best_first = [reply[0]["content"] for reply in ranking.rows[0]["replies"]]
    assert best_first == [order[2], order[0], order[1]]
    assert ranking.dropped == {"tied replies": 1}
    assert len(load(path, "preference", seed=None).rows) == 3 + 2


def test_ratings_and_demonstrations_are_training_data(tmp_path: Path):
    rows = [{"prompt": "Q?", "completion": text} for text in ("one", "two")]
    session = open_session(tmp_path / "ratings", rows=rows, mode="ratings", scale=7)
    for rating in (7, 1):
        session.submit(submission(session.next_task(), {"rating": rating}))
    path = DataSpec(str(tmp_path / "ratings" / "labels.jsonl"))
    rated = load(path, "rated", seed=None, keep=["rating"]).rows
    assert {row["completion"][0]["content"]: row["rating"] for row in rated} == {"one": 7, "two": 1}
    written = open_session(tmp_path / "written", rows=rows, mode="demonstrations")
    written.submit(submission(written.next_task(), {"completion": "my <b>reply</b>\n🙂"}))
    assert written.next_task() is None  # two rows with one prompt are one item
    sft = load(DataSpec(str(tmp_path / "written" / "labels.jsonl")), "sft", seed=None).rows
    assert sft[0]["completion"] == [{"role": "assistant", "content": "my <b>reply</b>\n🙂"}]


def test_a_session_continues_after_a_restart(tmp_path: Path):
    session = open_session(tmp_path)
    task = session.next_task()
    session.submit(submission(task, good_choice(task)))
    expected = session.next_task()
    session._file.close()
    again = open_session(tmp_path)
    assert again.next_task() == expected
    assert again.progress() == session.progress()
    assert again.submit(submission(task, good_choice(task))) == task.label_id
    assert len(lines(tmp_path / "labels.jsonl")) == 1


def test_a_label_without_its_undone_predecessors_can_be_replaced(tmp_path: Path):
    """An exported file has no undone labels, but its labels keep the ids of later attempts."""
    session = open_session(tmp_path, rows=pair_rows(1))
    task = submit_undo_and_submit(session, {"choice": "tie"})
    write_jsonl(tmp_path / "kept.jsonl", labels_not_undone(lines(tmp_path / "labels.jsonl")))
    kept = open_session(tmp_path, rows=pair_rows(1), file="kept.jsonl")
    with pytest.raises(ConflictingLabel, match="different label"):  # the first attempt is not live
        kept.submit(submission(task, {"choice": "first"}))
    kept.undo(str(kept.progress().last_label_id))
    kept.submit(submission(kept.next_task(), {"choice": "first"}))
    kept.undo(str(kept.progress().last_label_id))
    kept.submit(submission(kept.next_task(), {"choice": "second"}))
    rows = lines(tmp_path / "kept.jsonl")
    assert len({row["label_id"] for row in rows}) == len(rows) == 5
    assert len(labels_not_undone(rows)) == 1


def test_a_file_has_one_mode_and_one_writer(tmp_path: Path):
    session = open_session(tmp_path)
    session.submit(submission(session.next_task(), None))
    with pytest.raises(UserError, match="open in another"):
        LabelFile(tmp_path / "labels.jsonl")
    session._file.close()
    with pytest.raises(UserError, match="labels of mode pairs, not ratings"):
        open_session(tmp_path, mode="ratings")


@pytest.mark.parametrize(
    ("mode", "key", "answer"),
    [("pairs", "strengths", {"choice": "tie"}), ("ratings", "scale", {"rating": 2})],
)
def test_a_file_has_one_range_of_answers(tmp_path: Path, mode: Any, key: str, answer: dict):
    """The strength 3 of 3 and the strength 3 of 5 are different answers."""
    path = tmp_path / "labels.jsonl"
    session = open_session(tmp_path, mode=mode, **{key: 2})
    session.submit(submission(session.next_task(), answer))
    session.submit(submission(session.next_task(), None))
    session._file.close()
    assert [row[key] for row in lines(path)] == [2, 2]
    message = f"{key}: .* has labels with {key}: 2, not 3"
    settings = LabelSettings(mode, **{key: 3})
    with LabelFile(path) as file, pytest.raises(UserError, match=message) as caught:
        LabelingSession([], file, annotator="ann", settings=settings)
    assert "\n" not in str(caught.value)
    session = open_session(tmp_path, mode=mode, **{key: 2})
    assert session.progress().labeled == 1
    session._file.close()
    rows = [{name: value for name, value in row.items() if name != key} for row in lines(path)]
    write_jsonl(path, rows)  # labels of an earlier version
    session = open_session(tmp_path, mode=mode, **{key: 3})
    session.submit(submission(session.next_task(), answer))
    session._file.close()
    assert lines(path)[-1][key] == 3
    write_jsonl(path, [row | {key: "many"} for row in rows])
    with pytest.raises(UserError, match=f"row 1 is not a label \\({key} is not a whole number"):
        open_session(tmp_path, mode=mode)


@pytest.mark.parametrize(
    ("rest", "kept"),
    [(b'{"label_id": "x', 0), (b'{"label_id": "\xf0\x9f', 0), (b"", 0), (b"WHOLE", 1)],
)
def test_an_incomplete_last_line_is_removed(tmp_path: Path, rest: bytes, kept: int):
    session = open_session(tmp_path)
    session.submit(submission(session.next_task(), None))
    session._file.close()
    path = tmp_path / "labels.jsonl"
    complete = path.read_bytes()
    whole = complete.rstrip(b"\n").replace(b'"label_id": "', b'"label_id": "0')
    path.write_bytes(complete + (whole if rest == b"WHOLE" else rest))
    with LabelFile(path) as file:
        assert len(file.rows) == 1 + kept
        file.append(file.rows[0] | {"label_id": "new"})
    assert len(lines(path)) == 2 + kept


def changed_label(**changes: Any) -> bytes:
    """The line of a label of mode pairs with other values."""
    row: dict[str, Any] = {"label_id": "1", "item_id": "2", "mode": "pairs", "annotator": "a"}
    row |= {"prompt": [{"role": "user", "content": "q"}], "winner": "a"}
    for name in ("response_a", "response_b"):
        row[name] = [{"role": "assistant", "content": name}]
    return json.dumps(row | changes).encode() + b"\n"


def test_a_row_without_an_id_is_training_data(tmp_path: Path):
    """A person can have removed a column; an id of another type undoes nothing."""
    path = tmp_path / "labels.jsonl"
    row = json.loads(changed_label(winner="b"))
    del row["label_id"]
    others = changed_label(label_id=["x"]) + changed_label(label_id="2", undoes=["1"])
    path.write_bytes(json.dumps(row).encode() + b"\n" + changed_label() + others)
    assert len(load(DataSpec(str(path)), "preference", seed=None).rows) == 3


@pytest.mark.parametrize("winner", ["A", "response_b", None, 0])
def test_an_unknown_winner_is_not_training_data(tmp_path: Path, winner: Any):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(changed_label(winner="b") + changed_label(winner=winner))
    pairs = load(DataSpec(str(path)), "preference", seed=None)
    (pair,) = pairs.rows
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (
        "response_b",
        "response_a",
    )
    assert "1 winner is not a, b or tie" in pairs.summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"}\n', "row 1 is not a label"),
        (b"no json\n", "line 1: broken JSON"),
        (b"[1]\n", "line 1: expected an object"),
        (b"some text", "last line is not a label"),
        (changed_label(mode="votes"), "unknown mode"),
        (changed_label(annotator=5), "annotator is not a text"),
        (changed_label(seconds="1"), "seconds is not a number"),
        (changed_label(seconds=10**400), "seconds is not a number"),
        (changed_label(response_b=None), "no response_b"),
        (changed_label(winner=None), "no winner"),
        (changed_label(prompt="q"), "prompt is not a list of messages"),
        (changed_label(response_a="x"), "a reply is not a list of messages"),
        (changed_label(mode="rankings", replies=[[]], ranks=[1, 2]), "ranks are not a number for"),
        (changed_label(winner="c"), "winner is not a, b or tie"),
        (changed_label(mode=["pairs"]), "mode is not a text"),
        (changed_label(undoes=["1"]), "undoes is not a text"),
        (changed_label(note=5), "note is not a text"),
        (changed_label(margin="big"), "margin is not a number"),
        (changed_label(skipped=-1), "skipped is not true or false"),
        (changed_label(skipped=True, response_a=5), "a reply is not a list of messages"),
        (changed_label(gold="c"), "gold is not a or b"),
        (changed_label(mode="ratings", completion=[], rating=1, gold="a"), "gold is not a or b"),
        (changed_label(mode="demonstrations", completion=[]), "completion has no message"),
        (changed_label(mode="ratings", completion=[], rating=10**9), "rating is not a whole"),
    ],
)
def test_other_files_are_refused_and_unchanged(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        LabelFile(path)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match=r"must end in \.jsonl"):
        LabelFile(tmp_path / "labels.txt")


KILLED = """
import sys
from tests.labeling.helpers import good_choice, open_session, pair_rows, submission
from pathlib import Path

session = open_session(Path(sys.argv[1]), rows=pair_rows(500))
while (task := session.next_task()) is not None:
    print(session.submit(submission(task, good_choice(task))), flush=True)
"""


def test_no_acknowledged_label_is_lost_by_a_kill(tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    for number in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(20 + number)]
        process.kill()
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        with LabelFile(tmp_path / "labels.jsonl") as file:
            saved = [row["label_id"] for row in file.rows]
        assert set(acknowledged) <= set(saved)
        assert len(saved) == len(set(saved))


def test_items_are_read_from_many_layouts(tmp_path: Path):
    def items(mode, *rows):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        return read_items([DataSpec(str(tmp_path / "rows.jsonl"))], mode)

    (unlabeled,) = items("pairs", {"prompt": "Q", "response_a": "x", "response_b": "y"})
    assert unlabeled.best is None
    (labeled,) = items("pairs", {"prompt": "Q", "chosen": "y", "rejected": "x"})
    assert labeled.item_id == unlabeled.item_id
    assert labeled.replies == unlabeled.replies
    assert labeled.replies[labeled.best] == [{"role": "assistant", "content": "y"}]
    samples = [{"prompt": "Q", "completion": text} for text in ("x", "y", "x")]
    (sampled,) = items("pairs", *samples)
    assert sampled == unlabeled
    assert len(items("ratings", *samples)) == 2
    assert len(items("pairs", *ranking_rows(1, 4))) == 6
    assert len(items("rankings", *ranking_rows(1, 4))[0].replies) == 4
    assert len(items("demonstrations", *samples)) == 1
    with pytest.raises(UserError, match="no prompt has two different completions"):
        items("pairs", {"prompt": "Q", "completion": "x"})
    with pytest.raises(UserError, match="mode pairs needs the columns prompt with"):
        items("pairs", {"other": 1})
    write_jsonl(tmp_path / "gold.jsonl", samples)
    with pytest.raises(UserError, match="checks: the rows must state the better reply"):
        read_check_items([DataSpec(str(tmp_path / "gold.jsonl"))])
    swapped = {"prompt": "Q", "chosen": "b", "rejected": "a"}
    write_jsonl(tmp_path / "gold.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}, swapped])
    with pytest.raises(UserError, match="different better replies"):
        read_check_items([DataSpec(str(tmp_path / "gold.jsonl"))])


def test_replies_to_different_prompts_are_not_compared(tmp_path: Path):
    """The prompts differ in the system message, or only in case."""

    def prompt(system: str, text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]

    prompts = [prompt("Be brief.", "hi"), prompt("Be rude.", "hi"), prompt("Be brief.", "HI")]
    rows = [{"prompt": prompts[i], "completion": f"{i} {j}"} for j in range(2) for i in range(3)]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    items = read_items([DataSpec(str(tmp_path / "samples.jsonl"))], "pairs")
    assert [item.prompt for item in items] == prompts
    assert [[reply[0]["content"] for reply in item.replies] for item in items] == [
        [f"{i} 0", f"{i} 1"] for i in range(3)
    ]


def test_pseudonyms(tmp_path: Path):
    key = tmp_path / "secret" / "key"
    name = pseudonym_of("Ann Example", key)
    assert name == pseudonym_of("Ann Example", key)
    assert name != pseudonym_of("Bob", key)
    assert "Ann" not in name
    assert key.stat().st_mode & 0o077 == 0
    assert pseudonym_of("Ann Example", tmp_path / "other") != name
    (tmp_path / "short").write_text("abc")
    with pytest.raises(UserError, match="at least 16 characters"):
        pseudonym_of("Ann", tmp_path / "short")


def test_numbered_annotators_cannot_be_found_by_trying_names():
    names = ("x", "y", "x")
    rows = [
        {"annotator": name, "item_id": str(i), "label_id": label_id_of(name, str(i))}
        | {"shown_first": "a", "shown_order": [0, 1], "winner": "b"}
        for i, name in enumerate(names)
    ]
    numbered = with_numbered_annotators([*rows, {**rows[1], "label_id": "u", "undoes": "none"}])
    assert [row["annotator"] for row in numbered] == ["A1", "A2", "A1"]
    assert len({row["label_id"] for row in numbered}) == 3
    for row, name in zip(numbered, names, strict=True):
        assert row["label_id"] != label_id_of(name, row["item_id"])
        assert row.keys() == {"annotator", "item_id", "label_id", "winner"}


def test_live_labels_ignore_what_was_undone():
    rows = [{"label_id": "1"}, {"label_id": "2"}, {"label_id": "3", "undoes": "1"}]
    assert labels_not_undone(rows) == [{"label_id": "2"}]


@pytest.mark.parametrize("name", ["", " ann", "a\nb", "a\r\nb", "a\tb", "a\x1bb", "x" * 101])
def test_an_invalid_annotator(name: str):
    with pytest.raises(ValueError, match="annotator must be a visible text"):
        check_annotator(name)
    check_annotator("Ana María 2")
