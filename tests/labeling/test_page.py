"""The page's server in a process of its own: kills, repetitions, foreign requests, mistakes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.cli.main import main
from rlhf.common.files import write_jsonl
from tests.helpers.web import ServedCommand
from tests.labeling.helpers import lines, pair_rows

WORDS = ("label", "--data", "[{path: pairs.jsonl}]", "--output", "labels.jsonl", "--annotator")


def serve_labels(folder: Path, *more: str) -> ServedCommand:
    return ServedCommand([*WORDS, "ann", *more], folder)


@contextlib.contextmanager
def client_of(served: ServedCommand) -> Iterator[httpx.Client]:
    """A client that has opened the printed address, as a browser does."""
    with httpx.Client(base_url=served.base, follow_redirects=True) as client:
        page = client.get(f"/?token={served.token}")
        assert page.status_code == 200
        assert "Which reply is better?" in page.text
        client.headers["Origin"] = served.base
        yield client


def answer_to(task: dict[str, Any], **more: Any) -> dict[str, Any]:
    first = task["replies"][0][0]["text"].startswith("good")
    choice = {"choice": "first" if first else "second", "strength": 2}
    ids = {key: task[key] for key in ("label_id", "item_id")}
    return {**ids, "answer": choice, "note": "", "seconds": 1.5, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(20))
    return tmp_path


def test_twenty_pairs_with_a_kill_in_the_middle(folder: Path):
    saved = []
    for count in (9, 11):
        with serve_labels(folder) as served, client_of(served) as client:
            state = client.get("/api/task").json()
            assert (state["labeled"], state["total"]) == (len(saved), 20)
            for _ in range(count):
                task = client.get("/api/task").json()["task"]
                answer = client.post("/api/label", json=answer_to(task))
                assert answer.json() == {"saved": task["label_id"]}
                saved.append(task["label_id"])
            if count == 11:
                state = client.get("/api/task").json()
                assert (state["task"], state["labeled"]) == (None, 20)
            served.process.kill()
    rows = lines(folder / "labels.jsonl")
    assert [row["label_id"] for row in rows] == saved
    assert len({row["item_id"] for row in rows}) == 20
    assert all(row[f"response_{row['winner']}"][0]["content"].startswith("good") for row in rows)


def test_a_repetition_is_answered_like_the_first_also_after_a_restart(folder: Path):
    with serve_labels(folder) as served, client_of(served) as client:
        body = answer_to(client.get("/api/task").json()["task"])
        first = client.post("/api/label", json=body)
        before = (folder / "labels.jsonl").read_bytes()
        again = client.post("/api/label", json=body)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        served.process.kill()
    with serve_labels(folder) as served, client_of(served) as client:
        again = client.post("/api/label", json=body)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert (folder / "labels.jsonl").read_bytes() == before
        changed = client.post("/api/label", json=body | {"answer": {"choice": "tie"}})
        assert changed.status_code == 409
        assert "undo it first" in changed.json()["error"]
        undone = [client.post("/api/undo", json={"label_id": body["label_id"]}) for _ in "12"]
        assert undone[0].content == undone[1].content
        assert len(lines(folder / "labels.jsonl")) == 2
        code, errors = served.end(signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert errors.endswith("rlhf: stopped by SIGINT; the labels are in labels.jsonl\n")


def test_foreign_requests_get_nothing_and_malformed_ones_change_nothing(folder: Path):
    with serve_labels(folder) as served, client_of(served) as client:
        task = client.get("/api/task").json()["task"]
        body = answer_to(task)
        cookies = dict(client.cookies)
        foreign: list[dict[str, Any]] = [
            {"headers": {"Origin": "http://evil.example"}, "cookies": cookies},
            {"headers": {"Origin": "http://127.0.0.1:9"}, "cookies": cookies},
            {"headers": {"Origin": "null"}, "cookies": cookies},
            {"headers": {"Host": "evil.example"}, "cookies": cookies},
            {"headers": {"Authorization": "Bearer wrong"}},
            {},
        ]
        for options in foreign:
            for method, path in (("GET", "/"), ("GET", "/api/task"), ("POST", "/api/label")):
                answer = httpx.request(
                    method, served.base + path, json=body if method == "POST" else None, **options
                )
                assert answer.status_code in (401, 403)
                assert "Question" not in answer.text
        malformed: list[tuple[Any, int]] = [
            (b"{", 400),
            (b"[]", 400),
            (b"\xff", 400),
            (b"[" * 100_000, 400),
            ({}, 422),
            (body | {"label_id": 3}, 422),
            (body | {"item_id": "unknown"}, 422),
            (body | {"label_id": "other"}, 409),
            (body | {"answer": []}, 422),
            (body | {"answer": {"choice": "<b>"}}, 422),
            (body | {"seconds": "1"}, 422),
            (body | {"settings_id": 1}, 422),
            (body | {"settings_id": "other"}, 409),
            (body | {"note": None}, 422),
            (body | {"note": "x" * 300_000}, 422),
            (body | {"note": "x" * 5_000_000}, 413),
        ]
        for content, status in malformed:
            raw = {"content": content} if isinstance(content, bytes) else {"json": content}
            assert client.post("/api/label", **raw).status_code == status, content
        assert client.post("/api/undo", json={"label_id": task["label_id"]}).status_code == 422
        assert client.get("/api/label").status_code == 405
        assert (folder / "labels.jsonl").read_bytes() == b""
        long = body | {"seconds": 10**400}  # too large for a float
        assert client.post("/api/label", json=long).status_code == 200
        assert lines(folder / "labels.jsonl")[0]["seconds"] == 1e6
        (folder / "labels.jsonl").unlink()
        task = client.get("/api/task").json()["task"]
        answer = client.post("/api/label", json=answer_to(task))
        assert answer.status_code == 507
        assert "deleted or replaced" in answer.json()["error"]


def test_a_full_disk_is_reported_and_nothing_is_half_written(folder: Path):

    # A limit on the size of files stands for a full disk.
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); "
    code = limit + (
        "from pathlib import Path; from tests.labeling.helpers import *\n"
        "session = open_session(Path('.'), file='full.jsonl')\n"
        "for _ in range(3):\n"
        "    task = session.next_task()\n"
        "    try: session.submit(submission(task, good_choice(task), note='n' * 100))\n"
        "    except OSError as error: print(error.strerror)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout or "File too large" in done.stdout
    rows = lines(folder / "full.jsonl")
    assert 1 <= len(rows) < 3
    assert all("winner" in row for row in rows)


MISTAKES = [
    (["--annotator", "' '"], "annotator must be a visible text"),
    (["--annotator", "'ann '"], "without spaces at its ends"),
    (["--annotator", "a", "--checks", "[{path: pairs.jsonl}]"], "every item is also a check"),
    (["--annotator", "a\x1b"], "annotator must be a visible text"),
    (["--annotator", "a", "--output", "labels.csv"], "must end in .jsonl"),
    (["--annotator", "a", "--data", "[{path: none.jsonl}]"], "none.jsonl"),
    (["--annotator", "a", "--data", "[]"], "give at least one source"),
    (["--annotator", "a", "--order", "disagreement"], "set rewards and order: disagreement"),
    (["--annotator", "a", "--rewards", "[{kind: length}]"], "set rewards and order"),
    (["--annotator", "a", "--mode", "ratings", "--strengths", "2"], "strengths has no effect"),
    (["--annotator", "a", "--scale", "3"], "scale has no effect"),
    (["--annotator", "a", "--mode", "ratings", "--order", "suspicion"], "needs mode: pairs"),
    (["--annotator", "a", "--mode", "votes"], "mode must be"),
    (["--annotator", "a", "--check_every", "5"], "check_every has no effect"),
    (["--annotator", "a", "--port", "70000"], "port must be"),
    (["--annotator", "a", "--interface", "terminal", "--port", "1"], "port has no effect"),
    (
        ["--annotator", "a", "--checks", "[{path: pairs.jsonl}]", "--check_every", "1"],
        "check_every",
    ),
    (
        ["--annotator", "a", "--order", "disagreement", "--rewards", "[{kind: length}]"],
        "at least two members",
    ),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line(folder: Path, capsys, monkeypatch, more: list[str], message: str):
    monkeypatch.chdir(folder)
    words = ["label", "--data", "[{path: pairs.jsonl}]", "--output", "labels.jsonl", *more]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_a_missing_extra_is_one_line(folder: Path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*WORDS, "a"]) == 2
    assert 'pip install "rlhf-kit[web]"' in capsys.readouterr().err
