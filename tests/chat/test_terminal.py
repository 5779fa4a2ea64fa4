"""The chat in the terminal: a scripted one, and one in a second process with a real terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.chat.terminal import COMMANDS, Terminal
from rlhf.cli.main import main
from rlhf.common.text import escape_invisible
from rlhf.models.rewards import load_rewards
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.text_decoder import IncrementalReplyDecoder, IncrementalTextDecoder
from tests.chat.conftest import Checkpoints
from tests.helpers.chats import GUESS, generated, open_session
from tests.helpers.training import offline_tree, write_rows

TOOLKIT = Path(__file__).resolve().parents[2]


def run(session, *lines: str) -> str:
    """Everything that the terminal prints for these lines of input."""
    printed: list[str] = []
    rest = iter(lines)

    def read(prompt: str) -> str:
        printed.append(prompt)
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    Terminal(session, read=read, write=printed.append).run()
    return "".join(printed)


def test_a_conversation_with_every_command(checkpoints: Checkpoints, tmp_path: Path):
    session = open_session(checkpoints.paths, seed=3, reward=load_rewards([{"kind": "length"}]))
    saved = tmp_path / "talk.jsonl"
    text = run(
        session, ":help", "Which colour is the sky?", ":retry", ":vote b", "::now \\", "you",
        ":view a", ":undo", ":set temperature 0", ":system Be brief.", ":seed 9", "Guess",
        f":save {saved}", ":quit", "never sent",
    )  # fmt: skip
    assert all(command in text for command in COMMANDS)
    first = generated(checkpoints.folders[1], "Which colour is the sky?", seed=3, samples=2)
    assert f"[B] lora: {escape_invisible(first[0])}\n" in text
    assert f"[B] lora: {escape_invisible(first[1])}\n" in text
    assert text.count("score") >= 9
    assert "(vote: A is base, B is lora, C is unfinished)" in text
    assert re.search(r"user\W+:now \nyou", text)  # the template's text of the second message
    assert "(taken back; the conversation has 1 turn)" in text
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["base", "lora", "unfinished"]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[0]["rollout"]["temperature"] == 0
    assert "never sent" not in text


def test_an_environment_as_the_partner(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:1], env=GUESS, seed=8)
    hidden = session.branches[0].partner.env.unwrapped._hidden
    hint = session.branches[0].partner.env.unwrapped.expert()
    text = run(session, ":legal", ":hint", "", "0", str(hidden), "", ":next", ":reset")
    assert "system: Find a hidden number" in text
    assert "user: Guess a number from 1 to 20. 4 guesses left." in text
    assert "1, 2, 3, 4" in text
    assert f"> {hint}\n" in text
    assert "not a number in range" in text
    assert "reward of the environment 1; the episode is over, return 1" in text
    assert "(the episode is over: start it again, or start another one)" in text
    assert "(new conversation, seed 9)" in text


def test_wrong_lines_are_one_line_each(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:2])
    assert "(there is no reply yet)" in run(
        open_session(checkpoints.paths[:1], env=GUESS), ":retry"
    )
    lines = [":vote a", ":retry", ":undo", ":nonsense", ":seed -1", ":set temperature hot",
             ":save", ":save /", ":view z", ":"]  # fmt: skip
    text = run(session, *lines)
    answers = re.findall(r"^(?:> )?\((.*)\)$", text, re.MULTILINE)[1:]
    assert len(answers) == len(lines)
    assert session.turns == []


def test_control_codes_of_a_model_are_visible(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    hostile = "a\x1b[2J\u202eb\rc\x07"
    monkeypatch.setattr(IncrementalTextDecoder, "append", lambda self, ids: hostile)
    monkeypatch.setattr(ChatFormat, "decode_reply", lambda self, ids: hostile)
    session = open_session(checkpoints.paths[:2], rollout={"temperature": 0})
    text = run(session, "hello", ":view a")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert "a\\u001b[2J" in text


@pytest.mark.parametrize(
    ("env", "lines", "hint"),
    [
        (None, ("Guess", ":retry"), ":retry samples the replies again"),
        (GUESS, ("", ""), "Enter samples the replies again"),
    ],
)
def test_ctrl_c_cancels_a_reply(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, env: Any, lines: Any, hint: str
):
    session = open_session(checkpoints.paths[:1], **({"env": env, "seed": 8} if env else {}))
    append, calls = IncrementalReplyDecoder.append, []

    def interrupted(self: IncrementalReplyDecoder, ids: list[int]) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, ids)

    monkeypatch.setattr(IncrementalReplyDecoder, "append", interrupted)
    text = run(session, *lines)
    assert f"canceled; {hint}" in text
    assert len(session.turns) == 1


class TerminalProcess:
    """`rlhf chat` in a second process, whose terminal is a pseudo-terminal."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(TOOLKIT), "TERM": "dumb"}
        command = [sys.executable, "-m", "rlhf", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def wait_for(self, text: str, *, after: int = 0) -> int:
        """Read until a text appears; return its end in everything that was read."""
        deadline = time.monotonic() + 300
        while text not in self.text[after:]:
            assert time.monotonic() < deadline, self.text
            ready, _, _ = select.select([self.master], [], [], 1)
            if ready:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(self.text) from None
        return self.text.index(text, after) + len(text)

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[TerminalProcess]]:
    processes: list[TerminalProcess] = []
    yield processes
    for each in processes:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()
        os.close(each.master)


def test_votes_in_a_real_terminal_survive_a_kill_and_train(
    checkpoints: Checkpoints, tmp_path: Path, started: list[TerminalProcess]
):
    options = ["--labels", "votes.jsonl", "--blind", "--annotator", "ann",
               "--rollout.max_new_tokens", "12", "--seed", "3"]  # fmt: skip
    chat = TerminalProcess(*checkpoints.paths, *options, folder=tmp_path)
    started.append(chat)
    end = chat.wait_for(":help lists the commands")
    for number, question in enumerate(("Which colour is the sky?", "Guess", "Be brief")):
        chat.type(question)
        end = chat.wait_for("[C] ", after=end)
        end = chat.wait_for("\r\n> ", after=end)
        chat.type(f":vote {'abc'[number]}")
        end = chat.wait_for("(vote recorded: A is ", after=end)
        assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 2 * (number + 1)
    replies = generated(checkpoints.folders[1], "Which colour is the sky?", seed=3)
    assert escape_invisible(replies[0]) in chat.text.replace("\r\n", "\n")
    os.kill(chat.process.pid, signal.SIGKILL)
    chat.process.wait()
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert {row["annotator"] for row in rows} == {"ann"}

    tree = offline_tree(
        tmp_path / "reward", Path(checkpoints.paths[0]), tmp_path / "votes.jsonl",
        trainer={"max_steps": 2}, max_length=400, batch_size=2, micro_batch_size=1, evaluations=1,
    )  # fmt: skip
    config = write_rows(tmp_path / "reward.yaml", [tree])
    assert main(["reward", "--config", str(config)]) == 0
    assert (tmp_path / "reward" / "final").is_dir()
    assert main(["dpo", "--config", str(config), "--output_dir", str(tmp_path / "dpo")]) == 0


def test_a_file_that_cannot_be_written_does_not_end_the_chat(
    checkpoints: Checkpoints, tmp_path: Path
):
    session = open_session(checkpoints.paths[:1])
    assert "(there is no reply to save yet)" in run(session, f":save {tmp_path}/a.jsonl")
    (tmp_path / "file").touch()
    names = [
        f"{tmp_path}/{'x' * 300}",
        "a\0b",
        f"{tmp_path}/file/a",
    ]
    text = run(session, "hello", *(f":save {name}" for name in names))
    assert text.count(" cannot be written: ") == len(names)
    assert len(session.turns) == 1


def test_a_changed_setting_is_printed_exactly(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:1])
    assert "(max_new_tokens is 1234567)" in run(session, ":set max_new_tokens 1234567")


def test_ctrl_c_at_the_prompt_keeps_the_conversation(checkpoints: Checkpoints):
    session, printed = open_session(checkpoints.paths[:1]), []
    lines = iter(["hello", None, ":quit"])

    def read(prompt: str) -> str:
        if (line := next(lines)) is None:
            raise KeyboardInterrupt
        return line

    Terminal(session, read=read, write=printed.append).run()
    assert "(:quit or Ctrl-D ends the chat)" in "".join(printed)
    assert len(session.turns) == 1
