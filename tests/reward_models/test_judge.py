import contextlib
import http.client
import json
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf.common import chat_api
from rlhf.errors import UserError
from rlhf.reward_models import build
from rlhf.reward_models.judge import PairJudge, RatingJudge, endpoint
from tests.helpers.dripping_server import DRIPS, dripping_server

REPLIES = {"good": 9, "poor": 2}


def talk(reply: str):
    return [{"role": "user", "content": "q {last}"}, {"role": "assistant", "content": reply}]


def test_rating_is_scaled_and_the_last_one_counts():
    answers = [
        "Rating: 1 would be harsh.\n**Rating:** 10",
        "Rating: 5.5",
        "I like it",
        None,
        "Rating: 11",
    ]
    judge = RatingJudge(lambda prompts: answers, low=1, high=10)
    scores = judge.score([talk("x")] * 5)
    assert scores.values == [1.0, 0.5, None, None, None]
    assert scores.counts == {
        "judge: no rating in answer": 1,
        "judge: no answer": 1,
        "judge: rating out of range": 1,
    }


def test_the_prompt_shows_the_conversation_and_leaves_braces_alone():
    seen = []

    def generate(prompts):
        seen.extend(prompts)
        return ["Rating: 3"] * len(prompts)

    RatingJudge(generate).score([talk("a {high} brace")])
    assert "[User]\nq {last}" in seen[0]
    assert "[Assistant]\na {high} brace" in seen[0]
    assert "from 1 to 10" in seen[0]


def by_quality(prompt: str) -> str:
    first = prompt.index("[Reply A]")
    second = prompt.index("[Reply B]")
    a, b = prompt[first:second], prompt[second:]
    return "Winner: A" if ("good" in a) >= ("good" in b) else "Winner: B"


def test_pair_judge_with_position_bias_gives_ties():
    fair = PairJudge(lambda prompts: [by_quality(p) for p in prompts])
    assert fair.prefer([talk("good"), talk("poor")], [talk("poor"), talk("good")]) == [1.0, 0.0]
    assert fair.counts == {"agreed": 2}
    biased = PairJudge(lambda prompts: ["Winner: A"] * len(prompts))
    assert biased.prefer([talk("good")], [talk("poor")]) == [0.5]
    assert biased.counts == {"swapped": 1}
    silent = PairJudge(lambda prompts: ["Winner: A", None] * (len(prompts) // 2))
    assert silent.prefer([talk("good")], [talk("poor")]) == [None]


def test_mistakes():
    with pytest.raises(ValueError, match=r"must contain the field \{conversation\}"):
        RatingJudge(lambda p: [], template="Rate it")
    other = [{"role": "user", "content": "another"}, *talk("x")[1:]]
    with pytest.raises(ValueError, match="must have the same prompt"):
        PairJudge(lambda p: []).prefer([talk("x")], [other])
    with pytest.raises(ValueError, match="got 0 answers to 1 prompts"):
        RatingJudge(lambda p: []).score([talk("x")])


class Server(BaseHTTPRequestHandler):
    """Rates by the reply in the prompt; one answer never comes, one is refused, one malformed."""

    closing = threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        if "slow" in text:
            self.closing.wait(60.0)
        self.send_response(500 if "refused" in text else 200)
        self.end_headers()
        rating = next((n for word, n in REPLIES.items() if word in text), 1)
        message = {"role": "assistant", "content": f"Rating: {rating}"}
        answer = {} if "malformed" in text else {"choices": [{"message": message}]}
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    instance = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    Server.closing.clear()
    yield f"http://127.0.0.1:{instance.server_port}/v1"
    Server.closing.set()
    instance.shutdown()
    instance.server_close()


def test_endpoint_late_refused_and_malformed_answers_are_no_score(server):
    reward = build({"kind": "judge", "url": server, "model": "m", "timeout": 2.5})
    names = ("slow", "good", "refused", "malformed", "poor")
    scores = reward.score([talk(name) for name in names])
    assert scores.values == pytest.approx([None, 8 / 9, None, None, 1 / 9])
    assert scores.reasons[0] == "judge: TimeoutError: timed out"
    assert scores.reasons[2] == "judge: HTTPError: HTTP Error 500: Internal Server Error"
    assert str(scores.reasons[3]).startswith("judge: ")


def test_no_server_is_no_score():
    (answer,) = endpoint("http://127.0.0.1:9/v1", "m", timeout=1.0)(["x"])
    assert "Connection refused" in str(answer)


GOOD = b'{"choices": [{"message": {"content": "Rating: 10"}}]}'
OK = b"HTTP/1.1 200 OK\r\n"
# Response to a conversation with the reply "bad" -> reason of the missing score.
RESPONSES = {
    b"\x00\xff\r\n\r\n": "BadStatusLine",
    OK + b"Content-Length: 9\r\n\r\n{": "JSONDecodeError",
    OK + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n": "IncompleteRead",
    OK + b"A: b\r\n" * 200 + b"\r\n" + GOOD: "more than 100 headers",
    OK + b"A: " + b"x" * 70000 + b"\r\n\r\n": "LineTooLong",
    OK + b"\r\n" + b"[" * 200_000: "RecursionError",
    OK + b"\r\n" + b" " * 3000: "larger than 2000 bytes",
    b"HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n": "HTTPError: HTTP Error 302",
}


class RawServer(socketserver.StreamRequestHandler):
    """Sends fixed bytes; records every request line."""

    response = b""
    requests: list[bytes] = []  # noqa: RUF012

    def handle(self):
        self.requests.append(self.rfile.readline())
        length = 0
        while line := self.rfile.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split()[1])
        body = self.rfile.read(length)
        with contextlib.suppress(OSError):
            self.wfile.write(self.response if b"bad" in body else OK + b"\r\n" + GOOD)


@pytest.fixture
def raw_server():
    RawServer.requests.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), RawServer) as instance:
        instance.daemon_threads = True
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_address[1]}/v1"
        instance.shutdown()


@pytest.mark.parametrize("response", RESPONSES, ids=RESPONSES.values())
def test_a_wrong_response_costs_only_its_own_score(raw_server, monkeypatch, response):
    monkeypatch.setattr(chat_api, "_MAX_BODY", 250_000 if b"[[" in response else 2000)
    monkeypatch.setattr(RawServer, "response", response)
    scores = RatingJudge(endpoint(raw_server, "m")).score([talk("bad"), talk("good")])
    assert scores.values == [None, 1.0]
    assert RESPONSES[response] in str(scores.reasons[0])
    assert len(RawServer.requests) == 2  # a redirect is not followed: it would receive the key


@pytest.mark.parametrize("part", DRIPS)
def test_a_server_that_sends_single_bytes_exceeds_the_time_limit(monkeypatch, part):
    monkeypatch.setattr(http.client, "_MAXHEADERS", 10**9)
    with dripping_server(part) as (url, connections):
        scores = RatingJudge(endpoint(url + "/v1", "m", timeout=0.5)).score([talk("good")] * 2)
        assert scores.values == [None, None]
        assert scores.counts == {"judge: TimeoutError: timed out": 2}
        assert all(closed.wait(60.0) for closed in connections)  # no thread is left
        assert len(connections) == 2


def test_a_name_that_is_not_resolved_exceeds_the_time_limit(monkeypatch):
    resolved = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved.wait(60.0))
    try:
        (answer,) = endpoint("http://judge.invalid/v1", "m", timeout=0.1)(["x"])
        assert not resolved.is_set()
        assert isinstance(answer, TimeoutError)
    finally:
        resolved.set()


def test_a_key_that_no_header_can_contain_is_refused_without_its_value(raw_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2-hunter2\n")
    scores = RatingJudge(endpoint(raw_server, "m")).score([talk("good")])
    assert scores.values == [1.0]
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2\nhunter2")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        endpoint(raw_server, "m")
    assert "hunter2" not in str(error.value)


def test_a_judge_reads_the_text_of_any_message():
    seen = []

    def generate(prompts):
        seen.extend(prompts)
        return ["Rating: 10"] * len(prompts)

    call = {"role": "assistant", "tool_calls": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "two"}, " parts"]}
    assert RatingJudge(generate).score([[parts, call]]).values == [1.0]
    assert "[User]\ntwo parts\n\n[Assistant]\n\n" in seen[0]
