"""Functions and models on a server as policies of evaluate, compare and bench."""

import http.server
import json
import threading

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.table import run_command
from rlhf.errors import UserError
from rlhf.evaluation import text_policies
from rlhf.evaluation.compare import compare
from tests.helpers.training import read_rows, write_rows

CODE = """
def repeats(messages):
    assert all(set(message) == {"role", "content"} for message in messages)
    return messages[-1]["content"].removeprefix("Repeat: ")

def draws(messages, rng):
    return ["apple", "river"][rng.integers(2)]

class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self, messages):
        self.calls += 1
        messages.clear()
        return "apple" if self.calls % 2 else "river"

def number(messages):
    return 3

def broken(messages):
    return 1 / 0

def leaves(messages):
    raise SystemExit(0)

def extra(messages, other):
    return "apple"

class Needs:
    def __init__(self, folder):
        pass

half = chr(0xD800)

def surrogate(messages):
    return half
"""


def tree(folder, policies, **keys):
    return {
        "output_dir": str(folder),
        "env": {"id": "text/Echo-v0", "kwargs": {"num_words": 4}},
        "rollout": {"max_new_tokens": 3},
        "episodes": 12,
        "policies": policies,
    } | keys


@pytest.fixture
def code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def rows_of(folder, name):
    return read_rows(folder / "evaluation" / name / "episodes.jsonl")


def test_functions_play_the_episodes_of_the_other_policies(code, echo_model):
    policies = [
        {"name": name, "path": f"mine.py:{name}"} for name in ("repeats", "draws", "Counts")
    ]
    policies += [{"name": "random"}, {"name": "model", "model": {"path": str(echo_model)}}]
    run_command("evaluate", tree(code / "run", policies))
    seeds = {p["name"]: [row["seed"] for row in rows_of(code / "run", p["name"])] for p in policies}
    assert len({tuple(values) for values in seeds.values()}) == 1
    assert {row["return"] for row in rows_of(code / "run", "repeats")} == {1.0}
    played = {p["name"]: rows_of(code / "run", p["name"]) for p in policies}
    for own, other in zip(played["repeats"], played["model"], strict=True):
        assert own["messages"][:2] == other["messages"][:2]  # the same system message and prompt
        assert own["tokens"] is None
    run_command("evaluate", tree(code / "again", policies))
    assert [r["messages"] for r in rows_of(code / "again", "draws")] == [
        r["messages"] for r in played["draws"]
    ]
    result = compare([code / "run"], metric="return", baseline="model")
    best = next(d for d in result.differences if d.method == "repeats")
    assert best.winner == "repeats"
    assert best.estimate.units >= 4


def test_several_turns_and_actions_that_are_numbers(code):
    (code / "walk.py").write_text(
        "def walk(messages):\n    return 'up' if len(messages) == 2 else str(len(messages) % 4)\n"
    )
    env = {"id": "FrozenLake-v1", "kwargs": {}}
    policies = [{"name": "walk", "path": "walk.py:walk"}]
    keys = {"rollout": {"invalid": "retry", "invalid_reward": -1.0}, "env": env, "episodes": 4}
    run_command("evaluate", tree(code / "run", policies, **keys))
    for row in rows_of(code / "run", "walk"):
        assert row["turns"] == sum(m["role"] == "assistant" for m in row["messages"])
        assert row["turns"] > 1


def test_the_reference_answer_of_a_prompt_is_not_shown(code):
    write_rows(
        code / "p.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    )
    (code / "honest.py").write_text(
        "def adds(messages):\n"
        "    assert all(set(m) == {'role', 'content'} for m in messages), messages\n"
        "    return str(int(messages[-1]['content'].split()[2]) + 1)\n"
    )
    keys = {
        "env": {"prompts": [{"path": "p.jsonl"}]},
        "rewards": [{"kind": "exact_match"}],
        "episodes": 4,
    }
    run_command(
        "evaluate", tree(code / "run", [{"name": "adds", "path": "honest.py:adds"}], **keys)
    )
    scores = [row["components"]["exact_match"] for row in rows_of(code / "run", "adds")]
    assert scores == [1.0] * 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine.py:number", "returned a value of type int, expected a text"),
        ("mine.py:number", r"expected a text \(mine.py:\d+\)$"),
        ("mine.py:extra", r"\(mine.py:\d+\) has the wrong signature .*'other'.*policy\(messages\)"),
        ("mine.py:Needs", r"failed: TypeError: .*'folder' \(mine.py:\d+\)$"),
        ("mine.py:broken", r"broken failed: ZeroDivisionError.*mine.py:\d+"),
        ("mine.py:leaves", r"leaves failed: .*sys.exit"),
        ("mine.py:surrogate", "half of a surrogate pair"),
        ("mine.py:half", "is not a function or a class of callable objects"),
        ("mine.py:repeat", "does not exist; did you mean 'repeats'"),
        ("nothing.py:f", "nothing.py does not exist"),
        ("mine.py", r"must be file\.py:name or module:name"),
    ],
)
def test_mistakes_in_a_function_are_one_line(code, capsys, path, message):
    name = path.rpartition(":")[2].replace(".", "")
    (code / "c.yaml").write_text(yaml.safe_dump(tree(code / "run", [{"name": name, "path": path}])))
    assert main(["evaluate", "--config", "c.yaml"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert __import__("re").search(message, told), told


class Server(http.server.BaseHTTPRequestHandler):
    """Repeats the word of the last message; fails as often as it is told to."""

    requests: list = []  # noqa: RUF012
    failures: list = []  # noqa: RUF012
    refusal = "no such model"
    usage = True
    body: object = None
    """Body of all answers; None for a reply to the conversation."""

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append((query, self.headers.get("Authorization"), self.path))
        if type(self).failures:
            error = {"error": {"message": type(self).refusal}}
            return self.answer(type(self).failures.pop(), error)
        if type(self).body is not None:
            return self.answer(200, type(self).body)
        word = query["messages"][-1]["content"].removeprefix("Repeat: ")
        message = {"role": "assistant", "content": word}
        body = {"choices": [{"message": message, "finish_reason": "stop"}]}
        return self.answer(200, body | ({"usage": {"completion_tokens": 2}} if self.usage else {}))

    def answer(self, code, body):
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Keep the output of the test quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(text_policies, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(Server, "requests", [])
    monkeypatch.setattr(Server, "failures", [])
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{instance.server_port}/v1"
    instance.shutdown()
    instance.server_close()


def api(url, **keys):
    return [{"name": "served", "api": {"url": url, "model": "big", **keys}}]


@pytest.mark.parametrize("usage", [True, False])
def test_a_model_on_a_server_is_a_policy(tmp_path, server, monkeypatch, usage):
    monkeypatch.setattr(Server, "usage", usage)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-1")
    keys = {"rollout": {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9}}
    run_command("evaluate", tree(tmp_path / "run", api(server, parallel=3), **keys))
    rows = rows_of(tmp_path / "run", "served")
    assert [row["return"] for row in rows] == [1.0] * 12
    assert {row["tokens"] for row in rows} == ({2} if usage else {None})
    query, key, path = Server.requests[0]
    assert key == "Bearer secret-key-1"
    assert path == "/v1/chat/completions"
    sampling = {k: query[k] for k in ("model", "max_tokens", "temperature", "top_p")}
    assert sampling == {"model": "big", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9}
    assert [m["role"] for m in query["messages"]] == ["system", "user"]
    text = "".join(
        p.read_text()
        for p in (tmp_path / "run").rglob("*")
        if p.suffix in (".json", ".yaml", ".jsonl")
    )
    assert "secret-key-1" not in text
    run_command("evaluate", tree(tmp_path / "greedy", api(server), decoding="greedy"))
    assert Server.requests[-1][0]["temperature"] == 0.0


def test_a_server_receives_the_tools_and_the_tool_calls_of_a_prompt(tmp_path, server):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}
    prompt = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "user", "content": "And now?"},
    ]
    function = {"name": "add", "description": "?", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    write_rows(tmp_path / "p.jsonl", [{"prompt": prompt, "tools": tools, "answer": "3"}])
    keys = {"env": {"prompts": [{"path": str(tmp_path / "p.jsonl")}]}, "episodes": 2}
    rewards = [{"kind": "exact_match"}]
    run_command("evaluate", tree(tmp_path / "run", api(server), rewards=rewards, **keys))
    query = Server.requests[0][0]
    assert query["tools"] == tools
    assert [message["role"] for message in query["messages"]] == [m["role"] for m in prompt]
    assert query["messages"][1]["tool_calls"][0]["function"] == {
        "name": "add",
        "arguments": '{"a": 1}',
    }
    assert query["messages"][2]["tool_call_id"] == "c1"
    assert set(query["messages"][0]) == {"role", "content"}


def test_a_temporary_failure_is_repeated_and_another_one_is_told(tmp_path, server):
    Server.failures.extend([429, 503])
    run_command("evaluate", tree(tmp_path / "run", api(server, parallel=1)))
    assert len(Server.requests) == 14
    Server.failures.extend([404])
    with pytest.raises(UserError, match=r"big on .* gave no reply: HTTP 404 .*no such model"):
        run_command("evaluate", tree(tmp_path / "b", api(server)))
    Server.failures.extend([500] * 40)
    with pytest.raises(UserError, match=r"HTTP 500 .*continue with --resume"):
        run_command("evaluate", tree(tmp_path / "c", api(server)))
    with pytest.raises(UserError, match=r"rollout\.top_k is not part of the protocol"):
        run_command("evaluate", tree(tmp_path / "d", api(server), rollout={"top_k": 4}))
    with pytest.raises(UserError, match="must not contain an API key"):
        run_command("evaluate", tree(tmp_path / "e", api("http://me:pw@host/v1")))
    with pytest.raises(UserError, match="gave no reply"):
        run_command("evaluate", tree(tmp_path / "f", api("http://127.0.0.1:9/v1")))


@pytest.mark.parametrize("body", [[], {"choices": []}, {"choices": [None]}, {"choices": "x"}])
def test_an_answer_of_another_protocol_is_told(tmp_path, server, monkeypatch, body):
    monkeypatch.setattr(Server, "body", body)
    with pytest.raises(UserError, match="gave no reply: ValueError: the answer is not a chat"):
        run_command("evaluate", tree(tmp_path / "run", api(server)))


@pytest.mark.parametrize("usage", [[2], {"completion_tokens": 10**9}, {"completion_tokens": True}])
def test_an_impossible_number_of_tokens_is_unknown(tmp_path, server, monkeypatch, usage):
    choice = {"message": {"content": "apple"}, "finish_reason": "stop"}
    monkeypatch.setattr(Server, "body", {"choices": [choice], "usage": usage})
    run_command("evaluate", tree(tmp_path / "run", api(server), episodes=2))
    assert {row["tokens"] for row in rows_of(tmp_path / "run", "served")} == {None}


def test_a_reply_whose_reasoning_reached_the_limit_is_empty(tmp_path, server, monkeypatch):
    choice = {"message": {"content": None}, "finish_reason": "length"}
    monkeypatch.setattr(Server, "body", {"choices": [choice], "usage": {"completion_tokens": 3}})
    run_command("evaluate", tree(tmp_path / "run", api(server), episodes=2))
    for row in rows_of(tmp_path / "run", "served"):
        assert (row["messages"][-1]["content"], row["tokens"], row["return"]) == ("", 3, 0.0)
        assert row["length_limited"] == 1


def test_an_error_of_a_server_that_repeats_the_key_hides_it(tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-1")
    monkeypatch.setattr(Server, "failures", [401])
    monkeypatch.setattr(Server, "refusal", "wrong key secret-key-1")
    with pytest.raises(UserError, match=r"HTTP 401 .*wrong key \*\*\*") as caught:
        run_command("evaluate", tree(tmp_path / "run", api(server)))
    assert "secret-key-1" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"name": "x"}, "'x' needs a model, a path or an api"),
        ({"name": "x", "path": "a:b", "model": {"path": "m"}}, "has model and path; give only one"),
        ({"name": "x", "path": "a:b", "api": {"url": "u", "model": "m"}}, "has path and api"),
    ],
)
def test_a_policy_is_one_thing(tmp_path, policy, message):
    with pytest.raises(UserError, match=message):
        run_command("evaluate", tree(tmp_path / "run", [policy]))


def test_trained_seeds_against_a_function_have_its_error_in_common(code, echo_model):
    """Like the random policy, a function has no training seeds."""
    env = {"id": "text/Echo-v0", "kwargs": {"num_words": 4}}
    runs = [code / f"seed{seed}/model" for seed in range(3)]
    for seed, run in enumerate(runs):
        model = [{"name": "model", "model": {"path": str(echo_model)}}]
        run_command("evaluate", tree(run, model, env=env, seed=seed))
    run_command(
        "evaluate", tree(code / "rule", [{"name": "rule", "path": "mine.py:repeats"}], env=env)
    )
    result = compare([*runs, code / "rule"], metric="return", baseline="rule")
    [difference] = result.differences
    assert (difference.method, difference.unit) == ("model", "training seeds")
    assert difference.winner is None
    assert "at least 9 seeds" in difference.verdict
