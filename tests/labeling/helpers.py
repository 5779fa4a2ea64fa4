"""Items, sessions and answers of the tests of labeling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.config.labeling import LabelMode
from rlhf.labeling.items import read_items
from rlhf.labeling.session import LabelingSession, LabelingTask, LabelSettings, Submission
from rlhf.labeling.store import LabelFile


def pair_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]


def ranking_rows(count: int, replies: int = 3) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}?", "replies": [f"reply {j} of {i}" for j in range(replies)]}
        for i in range(count)
    ]


def open_session(
    folder: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    mode: LabelMode = "pairs",
    annotator: str = "ann",
    file: str = "labels.jsonl",
    **settings: Any,
) -> LabelingSession:
    """A session with the items of some rows; its file stays locked until it is garbage."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "items.jsonl", rows or pair_rows(4))
    items = read_items([DataSpec(str(folder / "items.jsonl"))], mode)
    return LabelingSession(
        items,
        LabelFile(folder / file),
        annotator=annotator,
        settings=LabelSettings(mode, **settings),
    )


def shown(task: LabelingTask) -> list[str]:
    """The replies as the annotator sees them."""
    return [task.item.replies[index][-1]["content"] for index in task.reply_order]


def submission(task: LabelingTask, answer: dict[str, Any] | None, **more: Any) -> Submission:
    return Submission(task.label_id, task.item.item_id, answer, **more)


def submit_undo_and_submit(session: LabelingSession, answer: dict[str, Any]) -> LabelingTask:
    """Submit an answer to the next item, undo it, submit it again, and close the label file.

    Returns:
        The task of the answer that was undone.
    """
    task = session.next_task()
    session.submit(submission(task, answer))
    session.undo(task.label_id)
    session.submit(submission(session.next_task(), answer))
    session._file.close()
    return task


def good_choice(task: LabelingTask, strength: int = 2) -> dict[str, Any]:
    """The answer that chooses the reply whose text begins with `good`."""
    first = shown(task)[0].startswith("good")
    return {"choice": "first" if first else "second", "strength": strength}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
