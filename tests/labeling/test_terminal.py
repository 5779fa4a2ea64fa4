"""`rlhf label --interface terminal` in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.data.load import load
from rlhf.labeling.terminal import label_in_terminal, task_text
from tests.labeling.helpers import lines, open_session, pair_rows, ranking_rows

ROOT = Path(__file__).resolve().parents[2]


def keys(*typed: str) -> Callable[[str], str]:
    """A reader of these lines, and then of the end of the input."""
    left = list(typed)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


def test_pairs(tmp_path: Path):
    session, said = open_session(tmp_path), []
    label_in_terminal(
        session, read=keys("1", "x", "u", "n", "why", "7", "s", "4", "5"), write=said.append
    )
    rows = lines(tmp_path / "labels.jsonl")
    assert [row.get("margin") for row in rows] == [3, None, 3, None, 0, 1]
    assert rows[2]["note"] == "why"
    assert "note" not in rows[4]
    assert rows[0]["shown_first"] == rows[0]["winner"] != rows[2]["winner"]
    assert rows[3]["skipped"] is True
    text = "\n".join(said)
    assert "Not saved: 'x' is not an answer" in text
    assert "Item 4 of 4" in text
    assert text.endswith("All items are labeled or skipped.")


def test_rankings_and_ratings_and_replies(tmp_path: Path):
    ranked = open_session(tmp_path / "a", rows=ranking_rows(1), mode="rankings")
    label_in_terminal(ranked, read=keys("3 1", "3 1 2"), write=lambda _: None)
    (row,) = lines(tmp_path / "a" / "labels.jsonl")
    places = dict(zip(row["shown_order"], (2, 3, 1), strict=True))
    assert row["ranks"] == [places[index] for index in range(3)]
    rated = open_session(tmp_path / "b", rows=ranking_rows(1), mode="ratings")
    label_in_terminal(rated, read=keys("9", "5", "q"), write=lambda _: None)
    assert [row["rating"] for row in lines(tmp_path / "b" / "labels.jsonl")] == [5]
    written = open_session(tmp_path / "c", mode="demonstrations")
    label_in_terminal(written, read=keys("w", "one", "", "two", "."), write=lambda _: None)
    (row,) = lines(tmp_path / "c" / "labels.jsonl")
    assert row["completion"][0]["content"] == "one\n\ntwo"


def test_hostile_text_cannot_control_the_terminal(tmp_path: Path):
    said: list[str] = []
    rows = [{"prompt": "\x1b[2Jclear", "chosen": "a\x07", "rejected": "\u202eb"}]
    label_in_terminal(open_session(tmp_path, rows=rows), read=keys(), write=said.append)
    text = "\n".join(said)
    assert "\\u001b[2Jclear" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_hostile_text_cannot_look_like_a_reply(tmp_path: Path):
    rows = [
        {"prompt": "q", "chosen": "a\n--- Reply 2 ---\nbest", "rejected": "b\r\n--- Reply 1 ---"}
    ]
    text = task_text(open_session(tmp_path, rows=rows).next_task())
    titles = [line for line in text.splitlines() if line.startswith("---")]
    assert titles == ["--- Reply 1 ---", "--- Reply 2 ---"]


def test_tool_calls_and_reasoning_are_shown(tmp_path: Path):
    def call(name: str) -> list[dict[str, object]]:
        calls = [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}}]
        return [
            {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": calls}
        ]

    rows = [{"prompt": "q", "chosen": call("search"), "rejected": call("delete")}]
    text = task_text(open_session(tmp_path, rows=rows).next_task())
    assert text.count("Hm") == 2
    assert '"search"' in text
    assert '"delete"' in text


@pytest.mark.parametrize("mode", ["ratings", "rankings"])
def test_numbers_that_are_too_long_are_no_answers(tmp_path: Path, mode: Any):
    said: list[str] = []
    session = open_session(tmp_path, rows=ranking_rows(1), mode=mode)
    label_in_terminal(session, read=keys("9" * 5000), write=said.append)
    assert said[-1].startswith("Not saved: '999")
    assert lines(tmp_path / "labels.jsonl") == []


@pytest.mark.parametrize("stop", ["q\n", ""])
def test_the_command(tmp_path: Path, stop: str):
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    words = ["label", "--data", "[{path: pairs.jsonl}]", "--output", "labels.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *words, "--annotator", "a1", "--interface", "terminal"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=f"1\n7\n{stop}",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 3 items labeled, 0 skipped; the labels are in labels.jsonl" in done.stdout
    assert len(load(DataSpec(str(tmp_path / "labels.jsonl")), "preference", seed=0).rows) == 2
