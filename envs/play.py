"""Play an environment in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf.common.text import escape_invisible
from rlhf.envs.catalog import make
from rlhf.envs.core import TextEnv

HELP = "(type your action; :legal lists actions, :hint shows the expert's action, :quit stops)"


def play(
    env_id: str,
    *,
    seed: int | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], Any] = print,
    **env_kwargs: Any,
) -> float:
    """Play one episode interactively.

    Args:
        env_id: Environment id, as for `rlhf.envs.catalog.find`.
        seed: Seed of the episode.
        read: Function that shows a prompt and returns a line of input. If it raises `EOFError`, the
            game stops.
        write: Function that prints a text.
        **env_kwargs: Keyword arguments of the environment.

    Returns:
        The undiscounted sum of the rewards that were received.
    """

    def show(text: Any) -> None:
        write(escape_invisible(str(text)))  # an environment can contain text of other people

    env = make(env_id, **env_kwargs)
    text, _ = env.reset(seed=seed)
    prompt = getattr(env.unwrapped, "system_prompt", None)
    for line in (prompt, HELP, "", text):
        if line is not None:
            show(line)
    total, done = 0.0, False
    while not done:
        try:
            action = read("> ")
        except EOFError:
            break
        if action.strip() == ":quit":
            break
        if action.strip() in (":legal", ":hint"):
            show(legal_actions_or_hint_text(env.unwrapped, action.strip()))
            continue
        text, reward, terminated, truncated, info = env.step(action)
        total, done = total + float(reward), terminated or truncated
        reason = info.get("reason", "")
        show(f"{text}\n[reward {float(reward):g}{f'; {reason}' if reason else ''}]".lstrip())
    write(f"Return: {total:g}")
    env.close()
    return total


def legal_actions_or_hint_text(env: Any, command: str) -> str:
    """Return the output of `:legal` or `:hint` for an environment, or why it is not available."""
    if not isinstance(env, TextEnv):
        return f"this environment does not support {command}"
    try:
        if command == ":legal":
            actions = env.legal_actions()
            shown = ", ".join(actions[:40])
            return f"{shown}, ... ({len(actions)} in all)" if len(actions) > 40 else shown
        return env.expert()
    except (NotImplementedError, ValueError) as error:
        return str(error)
