"""Replies to every reward and environment, and mutated chat templates."""

from __future__ import annotations

import functools
import importlib
import json
import math
import random
from collections.abc import Mapping
from importlib import resources
from typing import Any

import gymnasium as gym

from rlhf import envs, reward_models
from rlhf.data.messages import RowDropped
from rlhf.errors import UserError
from rlhf.models.scratch import make_tokenizer
from rlhf.rollout.chat_format import ChatFormat
from rlhf.rollout.demonstrations import encode_example
from tests.fuzz.values import NUMBERS, TEXTS

PIECES = (
    *TEXTS, "12", "-3", "1/2", "1e999", "7%", "$5", "\\frac{1}{2}", "\\boxed{7}", "}", "x^2", "^",
    "_", "\\sqrt", "\\left(", "(", ")", ",", ".", "٣", "½", "−", "\\pi", "10^{10^{10}}", "9" * 5000,
    "!", "<think>", "</think>", "<answer>", "</answer>", "```python\n", "```", "\n", "Answer:",
    "x = ", "[1, 2]", "{1}", "\\text{", "\\begin{pmatrix}", "&", "3:30 p.m.", "I cannot", "good",
    "not bad", "go", "look", "1", "2", "take key", "|", "a b c", "lookup(", '{"name": "f"}',
)  # fmt: skip
REWARDS: tuple[dict[str, Any], ...] = (
    {"kind": "exact_match"},
    {"kind": "number"},
    {"kind": "number", "tolerance": 0.1},
    {"kind": "math", "timeout": 1.0},
    {"kind": "regex", "pattern": "a+b"},
    {"kind": "format"},
    {"kind": "length", "low": 1, "high": 5},
    {"kind": "repetition"},
    {"kind": "refusal"},
    {"kind": "lexicon"},
)
KINDS = {reward["kind"] for reward in REWARDS}


def mutated_reply(generator: random.Random) -> dict[str, Any]:
    """Return a case: a reward and some replies with their reference answers."""
    answers = [_text(generator, 2) for _ in range(3)]
    if generator.random() < 0.2:
        answers = [generator.choice([*NUMBERS, None, [], ["1", "2"]]) for _ in range(3)]
    return {
        "reward": generator.choice(REWARDS),
        "replies": [_text(generator, 6) for _ in range(3)],
        "answers": answers,
    }


@functools.cache
def _reward(spec: str) -> Any:
    return reward_models.build(json.loads(spec))


def check_reply(case: Mapping[str, Any]) -> None:
    """Score the replies: every score is a finite number or None."""
    talks = [
        [
            {"role": "user", "content": "Hi", "answer": answer},
            {"role": "assistant", "content": text},
        ]
        for text, answer in zip(case["replies"], case["answers"], strict=True)
    ]
    try:
        scores = _reward(json.dumps(case["reward"]))(talks)
    except UserError:  # an answer of the wrong type
        return
    assert len(scores) == len(talks)
    assert all(score is None or math.isfinite(score) for score in scores)


def mutated_game(generator: random.Random) -> dict[str, Any]:
    """Return a case: an environment, its seed and the replies of an episode."""
    return {
        "env": generator.choice(sorted(envs.TASKS)),
        "seed": generator.randrange(2**31),
        "replies": [_text(generator, 5) for _ in range(generator.randrange(1, 12))],
    }


@functools.cache
def _environment(name: str) -> Any:
    return gym.make(f"text/{name}").unwrapped


def check_game(case: Mapping[str, Any]) -> None:
    """Play the replies: every reward is finite and every observation is text."""
    env = _environment(case["env"])
    observation, _ = env.reset(seed=case["seed"])
    for text in case["replies"]:
        assert isinstance(observation, str)
        observation, reward, terminated, truncated, _ = env.step(text)
        assert math.isfinite(reward)
        if terminated or truncated:
            break


@functools.cache
def _templates() -> tuple[str, ...]:
    importlib.import_module("trl")
    folder = resources.files("trl") / "chat_templates"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return tuple(file.read_text("utf-8") for file in files if file.name.endswith(".jinja"))


@functools.cache
def _tokenizer() -> Any:
    texts = ["user: Hi", "assistant: Hello there", "system: Be kind."] * 8
    return make_tokenizer(texts, 320)


def mutated_template(generator: random.Random) -> dict[str, str]:
    """Return a case: a family's template with pieces removed, repeated or replaced."""
    text = generator.choice(_templates())
    pieces = ("{{", "}}", "{%", "%}", "{% endif %}", "{{ messages }}", "{{ 1 / 0 }}",
              "{{ eos_token }}",
              "{{ raise_exception('no') }}", "{{ x.y.z }}", "{{ ''.__class__.__mro__ }}",
              "{% for i in range(10 ** 6) %}{% endfor %}", "{{ messages[9].content }}",
              *TEXTS[:30])  # fmt: skip
    for _ in range(generator.randrange(1, 4)):
        place = generator.randrange(len(text) + 1)
        end = min(len(text), place + generator.choice([0, 0, 1, 20, 200]))
        text = text[:place] + generator.choice(pieces) + text[end:]
    return {"template": text.encode("utf-8", "replace").decode()}


def check_template(case: Mapping[str, str]) -> None:
    """Open a chat format with the template and encode a conversation, or refuse it."""
    tokenizer = _tokenizer()
    before, tokenizer.chat_template = tokenizer.chat_template, case["template"]
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    try:
        chat_format = ChatFormat(tokenizer)
        chat_format.encode_prompt(prompt)
        chat_format.check_system_message_is_renderable(prompt)
        encode_example(chat_format, prompt, [{"role": "assistant", "content": "Hello"}])
    except (UserError, RowDropped):
        pass
    finally:
        tokenizer.chat_template = before


def _text(generator: random.Random, most: int) -> str:
    pieces = [generator.choice(PIECES) for _ in range(generator.randrange(most + 1))]
    text = generator.choice(["", " "]).join(pieces)
    return text.encode("utf-8", "replace").decode()
