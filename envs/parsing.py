"""Extract an action from a longer reply."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from rlhf.common.fences import without_reasoning
from rlhf.envs.core import check_choice
from rlhf.envs.wrappers import TextWrapper

_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class ParseAction(TextWrapper):
    """Extract the action from a longer reply: a tag, a box, a tool call or the last line.

    Reasoning in `<think>` is not searched. `<think>` tags in a fenced program or between quotation
    marks are part of the reply. A reply without an action in the form `form` is passed to the
    environment unchanged. The environment usually treats such a reply as an invalid action.
    `info["parsed"]` is True if an action was extracted.

    Args:
        env: The environment.
        form: "answer" extracts the last `<answer>...</answer>`, "boxed" the last `\\boxed{...}`,
            and "last_line" the last line. "tool" extracts a JSON tool call `{"name": ...,
            "arguments": {...}}` (bare, fenced, or in `<tool_call>`). The action is then one line
            with the name and the argument values, such as `lookup ada`.
    """

    def __init__(self, env: gym.Env[str, str], form: str = "answer") -> None:
        check_choice("form", form, tuple(PARSERS))
        super().__init__(env, form=form)
        self._parse = PARSERS[form]

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        parsed = self._parse(without_reasoning(action))
        result = self.env.step(action if parsed is None else parsed)
        text, reward, terminated, truncated, info = result
        return text, reward, terminated, truncated, {**info, "parsed": parsed is not None}


def _last_text_between(text: str, opening: str, closing: str) -> str | None:
    """Return the text between the last `opening` and the next `closing`; None if one is missing."""
    start = text.rfind(opening)
    if start < 0:
        return None
    end = text.find(closing, start + len(opening))
    return None if end < 0 else text[start + len(opening) : end].strip()


def _last_boxed_content(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}` or `\\fbox{...}`, up to its matching brace.

    Escaped braces are not counted. The result is None if there is no complete box.
    """
    boxes = list(_BOX_START.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()].strip()
    return None


def _tool_call_to_action(text: str) -> str | None:
    """Convert a JSON tool call to one line with the name and the argument values.

    The result is None if the text contains no tool call.
    """
    inner = _last_text_between(text, "<tool_call>", "</tool_call>") or text
    start, end = inner.find("{"), inner.rfind("}")
    if start < 0 or end < start:
        return None
    try:
        call = json.loads(inner[start : end + 1])
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # as in the interface of OpenAI
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return " ".join([name, *(str(value) for value in arguments.values())])


def _last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


PARSERS: dict[str, Callable[[str], str | None]] = {
    "answer": lambda text: _last_text_between(text, "<answer>", "</answer>"),
    "boxed": _last_boxed_content,
    "tool": _tool_call_to_action,
    "last_line": _last_line,
}
