"""Files that appear whole or not at all, and JSON lines that a run may still be writing."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.common.files import (
    atomic_path,
    json_line,
    read_json,
    read_jsonl,
    read_log,
    restore_interrupted_writes,
    write_jsonl,
    write_text,
)
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


def unfinished(folder: Path, host: str, process: int) -> Path:
    """Make the temporary folder of a killed process that wrote ``folder/model`` on a host."""
    partial = folder / f".model.{host}.{process}.rlhf-part"
    partial.mkdir()
    (partial / "stale").touch()
    return partial


def test_what_a_killed_process_of_this_machine_left_is_removed(tmp_path: Path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    host = platform.node().replace(".", "-")[:16]
    left, running = unfinished(tmp_path, host, killed.pid), unfinished(tmp_path, host, os.getppid())
    with atomic_path(tmp_path / "model") as partial:
        partial.mkdir()
    assert list((tmp_path / "model").iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [running, tmp_path / "model"]
    assert not left.exists()


def test_what_another_machine_left_is_removed_after_a_day(tmp_path: Path):
    new, old = unfinished(tmp_path, "other", os.getpid()), unfinished(tmp_path, "other", 1)
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    restore_interrupted_writes(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


KILLED_REPLACEMENT = """
import os, sys
from pathlib import Path
from rlhf.common import files

calls, last = 0, int(sys.argv[2])

def counted(event, arguments):
    global calls
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
        calls += 1
        if calls > last:
            os._exit(9)

with files.atomic_path(Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "a").write_text("new")
    (partial / "b").write_text("new")
    sys.addaudithook(counted)
"""


def test_a_folder_is_whole_after_a_kill_at_any_operation(tmp_path: Path):
    """The process ends before its first, second, ... operation on the file system."""
    found = []
    for last in range(20):
        target = tmp_path / str(last) / "model"
        target.mkdir(parents=True)
        for name in "ab":
            (target / name).write_text("old")
        program = [sys.executable, "-c", KILLED_REPLACEMENT, str(target), str(last)]
        killed = subprocess.run(program, check=False).returncode
        restore_interrupted_writes(tmp_path)
        assert list(target.parent.iterdir()) == [target]
        found.append({(path.name, path.read_text()) for path in target.iterdir()})
        if killed == 0:
            break
    old, new = ({(name, content) for name in "ab"} for content in ("old", "new"))
    assert found == [old] * found.count(old) + [new] * found.count(new)
    assert found.count(old) >= 2
    assert found.count(new) >= 4


def test_two_processes_write_the_same_file_at_once(tmp_path: Path):
    path = tmp_path / "report.html"
    program = f"from rlhf.common.files import write_text as w; w(Path({str(path)!r}), 'other')"
    with atomic_path(path) as partial:
        partial.write_text("this")
        subprocess.run([sys.executable, "-c", f"from pathlib import Path; {program}"], check=True)
        assert path.read_text() == "other"
    assert path.read_text() == "this"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ('{"step": 1}\n', [1]),
        ('{"step": 1}\n{"step": 2}', [1, 2]),
        ('{"step": 1}\n{"st', [1]),
        ('{"step": 1}\n{"text": "\udce2\udc80', [1]),  # two of the three bytes of U+2028
        ('{"step": 1, "text": "a\u2028b"}\n{"step": 2}\n', [1, 2]),
    ],
)
def test_read_log_leaves_out_an_unfinished_last_line(tmp_path: Path, text: str, steps: list[int]):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert [row["step"] for row in read_log(path)] == steps


def test_read_log_names_file_and_line_of_a_broken_row(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1}\n{oops\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: broken JSON"):
        read_log(path)


ODD = "a\u2028b\u0085c\x0cd\x1ce\rf😀"


def test_lines_end_at_newlines_alone(tmp_path: Path):
    rows = [{"text": ODD, ODD: 1}, {"text": "b"}]
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert write_jsonl(tmp_path / name, rows) == 2
        assert read_jsonl(tmp_path / name) == rows
    (tmp_path / "log.jsonl").write_text("".join(map(json_line, rows)), encoding="utf-8")
    assert read_log(tmp_path / "log.jsonl") == rows


def test_half_of_a_surrogate_pair_is_written_as_its_escape(tmp_path: Path):
    assert json_line({"text": "a\ud800é"}) == '{"text": "a\\ud800é"}\n'
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a\ud800é"}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"text": "a\ud800é"}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1,\n2", "line 2: broken JSON"),
        ("{}\n{}", "line 2: broken JSON, Extra data; if the file has one object per line"),
        ("[" * 100_000, "JSON that cannot be read"),
        ("1" * 5000, "JSON that cannot be read"),
    ],
)
def test_json_that_cannot_be_read_is_refused(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert problem in str(caught.value)
    (tmp_path / "a.jsonl").write_text(text.replace("\n", " ") + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1"):
        read_jsonl(tmp_path / "a.jsonl")


def test_json_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(
        UserError, match=r"a\.json: not UTF-8 text \(invalid start byte at byte 7\)"
    ):
        read_json(path)


TWICE = "the key 'text' occurs twice in an object; remove one of them"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": "b", "n": 1, "text": "c"}\n', 2),
        ("rows.jsonl", '{"talk": [{"text": "a", "text": "a"}]}\n', 1),
        ("rows.json", '[\n  {"text": "a"} ,\n  {"n": [1],\n   "text": 1, "text": 2}]', 3),
        ("rows.json", '{"rows": {"text": 1, "text": 2}}', 1),
    ],
)
def test_an_object_with_the_same_key_twice_is_refused(
    tmp_path: Path, name: str, content: str, line: int
):
    path = tmp_path / name
    path.write_text(content)
    read = read_jsonl if name.endswith("l") else read_json
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path}, line {line}: {TWICE}"


def test_json_is_read_as_json(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('{"rate": 1e-05, "name": "\\ud83d\\ude00", "date": "2024-01-01"}')
    assert read_json(path) == {"rate": 1e-05, "name": "😀", "date": "2024-01-01"}
