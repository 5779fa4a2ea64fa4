"""Files that appear whole or not at all, and JSON lines that a run may still be writing."""

from pathlib import Path

import pytest

from rlhf.common.files import atomic_path, read_log, write_text
from rlhf.errors import UserError


def test_atomic_path_replaces_a_file_and_a_folder(tmp_path: Path):
    write_text(tmp_path / "new" / "a.txt", "one")
    write_text(tmp_path / "new" / "a.txt", "two")
    assert (tmp_path / "new" / "a.txt").read_text() == "two"
    for content in ("one", "two"):
        with atomic_path(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / content).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def test_atomic_path_keeps_the_old_content_when_the_block_fails(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_halfway() -> None:
        with atomic_path(path) as partial:
            partial.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_removes_what_a_killed_process_left(tmp_path: Path):
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part" / "stale").touch()
    with atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ('{"step": 1}\n', [1]),
        ('{"step": 1}\n{"step": 2}', [1, 2]),
        ('{"step": 1}\n{"st', [1]),
        ('{"step": 1, "text": "a\u2028b"}\n{"step": 2}\n', [1, 2]),
    ],
)
def test_read_log_leaves_out_an_unfinished_last_line(tmp_path: Path, text: str, steps: list[int]):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert [row["step"] for row in read_log(path)] == steps


def test_read_log_names_file_and_line_of_a_broken_row(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1}\n{oops\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: broken JSON"):
        read_log(path)
