"""Rows of every kind of data, and the check of mutated ones."""

from __future__ import annotations

import copy
import random
import tempfile
from pathlib import Path
from typing import Any, get_args

from rlhf.common.files import json_line
from rlhf.config.data import DataSpec, Kind
from rlhf.data import load
from rlhf.errors import UserError
from tests.fuzz.values import mutate

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TALK = [USER, REPLY]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Hi", "completion": "Hello"},
    {"question": "Hi", "answer": "Hello", "final": "no"},
    {"instruction": "Hi", "input": "there", "output": "Hello", "system": "Be kind."},
    {"prompt": [USER], "completion": [REPLY]},
    {"messages": [*TALK, {**REPLY, "weight": 0, "reasoning_content": "hm"}]},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, REPLY],
     "tools": '[{"name": "f", "parameters": {}}]'},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
    {"messages": "\n\nHuman: Hi\n\nAssistant: Hello"},
    {"messages": [{"input": "Hi", "output": "Hello"}]},
    {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": 0.5},
    {"prompt": "Hi", "chosen": [*TALK], "rejected": [USER, {**REPLY, "content": "No"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "Hi", "response_a": "Yes", "response_b": "No", "winner": "a"},
    {"prompt": "Hi", "response_a": "Yes", "response_b": "No", "score_a": 1, "score_b": 0.5},
    {"prompt": "Hi", "completion": "Hello", "label": True},
    {"messages": TALK, "label": 1, "rating": 0.5},
    {"text": "plain text", "label": 2},
    {"text": "plain text"},
    {"prompt": "Hi", "answer": "3", "tests": ["assert f(1) == 2"]},
    {"prompt": "Hi", "replies": ["a", "b", "c"]},
    {"prompt": "Hi", "replies": ["a", "b"], "scores": [1, 2]},
    {"prompt": "Hi", "steps": ["a", "b"], "labels": [1, 0]},
    {"prompt": "Hi", "completions": ["a", "b"], "labels": [True, False]},
    {"history": [["a", "b"]], "instruction": "Hi", "output": "Hello"},
    {"prompt": "Hi", "completions": [{"response": "a", "overall_score": 3}, {"response": "b",
     "overall_score": 1}]},
    {"question": "Hi", "response_0": "a", "response_1": "b", "better_response_id": 0,
     "is_response_0_safe": True, "is_response_1_safe": False},
    {"context": "c", "question": "Hi", "answer": {"text": ["x"], "answer_start": [0]}},
    {"prompt": "Hi", "response": "a", "helpfulness": 4, "correctness": 3},
)  # fmt: skip
KINDS = get_args(Kind)


def mutated_rows(generator: random.Random) -> dict[str, Any]:
    """Return a case: the kind, a source's settings, and some rows of one layout, mutated."""
    row = generator.choice(ROWS)
    table = [copy.deepcopy(row) for _ in range(generator.randrange(1, 6))]
    for changed in table:
        for _ in range(generator.randrange(3)):
            mutate(changed, generator)
    if generator.random() < 0.1:
        table.append(copy.deepcopy(generator.choice(ROWS)))
    spec: dict[str, Any] = {}
    if generator.random() < 0.1:
        spec["system"] = generator.choice(["", "Be kind.", "\u2028"])
    if generator.random() < 0.1:
        spec["columns"] = {
            generator.choice(["prompt", "completion", "text"]): generator.choice([*row, "x", "a.b"])
        }
    return {"kind": generator.choice(KINDS), "spec": spec, "rows": table}


def check_rows(case: dict[str, Any]) -> int:
    """Load the rows of a case; return their number.

    Every row is used, counted as dropped, or unused, and the used ones are text in UTF-8.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = [json_line({str(key): value for key, value in row.items()}) for row in case["rows"]]
        path.write_text("".join(lines), encoding="utf-8")
        try:
            loaded = load(DataSpec(str(path), **case["spec"]), case["kind"], seed=0)
        except UserError:
            return len(case["rows"])
    assert loaded.total == len(loaded.rows) + sum(loaded.dropped.values()) + loaded.unused
    for row in loaded.rows:
        json_line(row).encode()
    assert loaded.summary()
    return len(case["rows"])
