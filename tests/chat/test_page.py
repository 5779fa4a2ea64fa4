"""The chat as a page: its API, and a scripted conversation in a real browser."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rlhf.chat.page import chat_application
from rlhf.common.files import read_jsonl
from rlhf.common.text import escape_invisible
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.text_decoder import IncrementalReplyDecoder, IncrementalTextDecoder
from tests.chat.conftest import Checkpoints
from tests.helpers.browser import Page, open_browser
from tests.helpers.chats import GUESS, generated, open_session
from tests.helpers.web import ServedCommand

TOOLKIT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\x1b[2J\u202e"


def shown_replies(checkpoints: Checkpoints) -> list[str]:
    """Replies of `rlhf generate` to the same message, as the page shows them."""
    replies = [generated(f, "Which colour is the sky?", seed=3)[0] for f in checkpoints.folders]
    return [escape_invisible(reply) for reply in replies]


def client_of(session: Any) -> TestClient:
    return TestClient(chat_application(session))


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_replies_are_streamed_and_are_those_of_generate(checkpoints: Checkpoints):
    client = client_of(open_session(checkpoints.paths, seed=3))
    lines = events(client.post("/api/send", json={"text": "Which colour is the sky?"}))
    *texts, last = lines
    shown = {}
    for event in texts:
        shown.setdefault(event["letter"], []).append(event["text"])
    expected = shown_replies(checkpoints)
    assert [shown[letter][-1] for letter in "ABC"] == expected
    assert max(map(len, shown.values())) > 5
    replies = last["state"]["turns"][0]["replies"]
    assert [reply["text"] for reply in replies] == expected
    assert [reply["name"] for reply in replies] == ["base", "lora", "unfinished"]
    assert client.get("/api/state").json() == last["state"]


def test_every_change_of_a_conversation(checkpoints: Checkpoints):
    client = client_of(open_session(checkpoints.paths[:2], seed=3, blind=True))
    events(client.post("/api/send", json={"text": "Guess"}))
    (turn,) = events(client.post("/api/retry"))[-1]["state"]["turns"]
    state = client.post("/api/vote", json={"turn": turn["id"], "letter": "B"}).json()
    assert [reply["preferred"] for reply in state["turns"][0]["replies"]] == [False, True]
    assert {reply["name"] for reply in state["turns"][0]["replies"]} == {"base", "lora"}
    state = events(client.post("/api/send", json={"text": "Be brief"}))[-1]["state"]
    assert {reply["name"] for reply in state["turns"][1]["replies"]} == {None}
    assert client.post("/api/undo").json()["turns"] == state["turns"][:1]
    settings = {"temperature": 0, "seed": str(2**62), "system": "Answer"}
    state = client.post("/api/settings", json=settings).json()
    assert (state["seed"], state["system"], state["turns"]) == (str(2**62), "Answer", [])
    assert state["settings"]["temperature"] == 0
    events(client.post("/api/send", json={"text": "Guess"}))
    assert "Answer" in client.get("/api/view/b").json()["text"]
    assert client.get("/api/view/x").status_code == 400
    rows = [json.loads(line) for line in client.get("/api/transcripts").text.splitlines()]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert client.post("/api/reset").json()["turns"] == []


def test_a_vote_on_a_page_with_an_earlier_state_is_refused(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:2], seed=3, blind=True)
    client = client_of(session)
    (turn,) = events(client.post("/api/send", json={"text": "Guess"}))[-1]["state"]["turns"]
    (retried,) = events(client.post("/api/retry"))[-1]["state"]["turns"]  # in another window
    for vote in ({"letter": "A"}, {"letter": "A", "turn": turn["id"]}, {"turn": retried["id"]}):
        assert client.post("/api/vote", json=vote).status_code == 400
    assert not session.turns[-1].is_voted
    response = client.post("/api/vote", json={"letter": "A", "turn": turn["id"]})
    assert "has changed in another window" in response.json()["error"]
    vote = {"letter": None, "turn": retried["id"]}
    assert client.post("/api/vote", json=vote).json()["turns"][0]["is_tie"]
    assert client.post("/api/unvote", json={"turn": turn["id"]}).status_code == 400
    assert client.post("/api/unvote", json={"turn": retried["id"]}).status_code == 200


def test_an_environment_as_the_partner(checkpoints: Checkpoints):
    session = open_session(checkpoints.paths[:2], env=GUESS, seed=8)
    hidden = session.branches[0].partner.env.unwrapped._hidden
    client = client_of(session)
    state = client.get("/api/state").json()
    assert state["waiting"]["message"].startswith("Guess a number")
    assert [message["role"] for message in state["opening"]] == ["system"]
    events(client.post("/api/generate"))
    state = client.post("/api/act", json={"text": str(hidden)}).json()
    assert state["turns"][1]["given_by_user"]
    assert [reply["end"] for reply in state["turns"][1]["replies"]] == ["correct"] * 2
    assert "the episode is over, return 1" in state["turns"][1]["replies"][0]["notes"]
    assert client.post("/api/generate").status_code == 400
    assert client.post("/api/reset", json={"next": True}).json()["seed"] == "9"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("send", b"{"),
        ("send", b"[]"),
        ("send", b"{}"),
        ("send", b'{"text": 3}'),
        ("send", b'{"text": ""}'),
        ("send", b'{"text": "\\ud800"}'),
        ("send", b"[" * 100_000),
        ("vote", b'{"letter": "A"}'),
        ("vote", b'{"letter": ["A"]}'),
        ("settings", b'{"temperature": "hot"}'),
        ("settings", b'{"temperature": NaN}'),
        ("settings", b'{"seed": 1}'),
        ("settings", b'{"seed": "-1"}'),
        ("settings", b'{"system": null, "top_k": 3}'),
        ("settings", b'{"system": "\\ud800"}'),
        ("undo", b"{}"),
        ("retry", b"{}"),
        ("generate", b"{}"),
        ("act", b'{"text": "1"}'),
    ],
)
def test_a_wrong_request_changes_nothing(checkpoints: Checkpoints, path: str, body: bytes):
    client = client_of(open_session(checkpoints.paths[:2]))
    before = client.get("/api/state").json()
    response = client.post(f"/api/{path}", content=body)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert client.get("/api/state").json() == before


def test_one_request_at_a_time_and_stop(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    started, go_on = threading.Event(), threading.Event()
    append = IncrementalReplyDecoder.append

    def slow(self: IncrementalReplyDecoder, ids: list[int]) -> None:
        started.set()
        go_on.wait(60)
        append(self, ids)

    monkeypatch.setattr(IncrementalReplyDecoder, "append", slow)
    session = open_session(checkpoints.paths[:1])
    client = client_of(session)
    answers: list[Any] = []
    body = {"text": "Guess"}
    thread = threading.Thread(target=lambda: answers.append(client.post("/api/send", json=body)))
    thread.start()
    assert started.wait(60)
    assert client.post("/api/send", json=body).status_code == 409
    assert client.get("/api/state").status_code == 409
    assert client.post("/api/stop").status_code == 200
    go_on.set()
    thread.join(60)
    last = events(answers[0])[-1]
    assert "stopped" in last["error"]
    assert last["state"]["turns"] == []
    assert last["state"]["waiting"]["message"] == "Guess"
    assert len(events(client.post("/api/retry"))[-1]["state"]["turns"]) == 1


def test_texts_of_models_have_no_invisible_characters(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(IncrementalTextDecoder, "append", lambda self, ids: HOSTILE)
    monkeypatch.setattr(ChatFormat, "decode_reply", lambda self, ids: HOSTILE)
    client = client_of(open_session(checkpoints.paths[:1]))
    response = client.post("/api/send", json={"text": HOSTILE})
    last = events(response)[-1]["state"]["turns"][0]
    assert last["replies"][0]["text"].endswith("\\u001b[2J\\u202e")
    assert last["message"].endswith("\\u001b[2J\\u202e")
    assert HOSTILE.encode() not in response.content


TEXTS = "[...document.querySelectorAll('.turn:last-child .reply .text')].map(e => e.textContent)"
IDLE = "document.body.dataset.busy === 'false'"


@pytest.fixture
def served(checkpoints: Checkpoints, tmp_path: Path) -> Iterator[ServedCommand]:
    options = ["--labels", "votes.jsonl", "--rollout.max_new_tokens", "12", "--seed", "3"]
    arguments = ["chat", *checkpoints.paths, "--interface", "page", *options]
    with ServedCommand([*arguments, "--rewards", "[{kind: length}]"], tmp_path) as command:
        yield command


def check_sizes_and_colors(page: Page, pictures: Path) -> None:
    """Check that nothing is wider than the window, and that dark pages are dark."""
    papers = set()
    for width, dark in ((380, False), (380, True), (1280, True)):
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=800,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.picture(pictures / f"chat-{width}-{scheme['value']}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


@pytest.mark.browser
def test_a_scripted_conversation_in_a_browser(
    checkpoints: Checkpoints, served: ServedCommand, tmp_path: Path
):
    pictures = Path(os.environ.get("RLHF_PICTURES", tmp_path))
    with open_browser(tmp_path / "profile") as page:
        page.show(served.url)
        page.wait_for("document.querySelector('#about').textContent.includes('unfinished')")
        assert "token" not in page.evaluate("location.href")
        page.click("#text")
        page.type("Which colour is the sky?")
        page.press("Enter")
        page.wait_for("document.querySelectorAll('[data-vote]').length === 3")
        expected = shown_replies(checkpoints)
        assert page.evaluate(TEXTS) == expected
        assert "score" in page.evaluate("document.querySelector('.notes').textContent")
        page.picture(pictures / "chat-1280-light.png")
        page.click("[data-vote='C']")
        page.wait_for("document.querySelector('.reply.preferred')")
        assert len(read_jsonl(tmp_path / "votes.jsonl")) == 2
        page.click("#text")
        page.type("<b>Guess</b> " + "x" * 200)
        page.click("#send")
        page.wait_for(f"document.querySelectorAll('.turn').length === 2 && {IDLE}")
        assert page.evaluate("document.querySelector('.turn:last-child b') === null")
        page.click("#tie")
        page.wait_for("document.querySelector('#unvote')")
        page.click("#unvote")
        page.wait_for("document.querySelector('#tie')")
        page.click("#retry")
        page.wait_for(f"document.querySelector('#tie') && {IDLE}")
        check_sizes_and_colors(page, pictures)
        page.click("#undo")
        page.wait_for(f"document.querySelectorAll('.turn').length === 1 && {IDLE}")
        page.click(".turn:last-child .view summary")
        page.wait_for("document.querySelector('.view pre').textContent.includes('<|user|>')")
        assert page.console == []
        assert all(url.startswith((served.base, "data:", "about:")) for url in page.requests)
    rows = read_jsonl(tmp_path / "votes.jsonl")
    assert [row.get("winner") == "tie" for row in rows] == [False] * 2 + [True] * 3 + [False] * 3
    assert [row["undoes"] for row in rows[5:]] == [row["label_id"] for row in rows[2:5]]
    winners = {row["response_" + row["winner"]][0]["content"] for row in rows[:2]}
    assert {escape_invisible(text) for text in winners} == {expected[2]}
    served.process.send_signal(signal.SIGKILL)
    served.process.wait(60)
    assert read_jsonl(tmp_path / "votes.jsonl") == rows
