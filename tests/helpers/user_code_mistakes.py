"""Twelve mistakes in rewards, environments and plug-ins: a file, the keys of a run, the message.

The line that the message names has the comment "here" in the file.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

MISTAKES = (
    "import error",
    "wrong signature",
    "wrong shape",
    "wrong length",
    "None",
    "nan",
    "text for a number",
    "exception",
    "hang",
    "exit",
    "changed argument",
    "not picklable",
)


@dataclass(frozen=True)
class Case:
    """A mistake: a file, and the message with "…" for any text and "LINE" for the line."""

    code: str
    message: str
    keys: dict[str, Any] = field(default_factory=dict)
    succeeds: bool = False
    """Whether the message is a warning of a run that continues."""


def reward(body: str) -> str:
    """A file with a reward function."""
    return f"import sys\nimport time\n\ndef score(conversations):  # here\n    {body}\n"


UNSCORED = (
    "…% of the episodes could not be scored, more than shaping.max_unscored = …: … x score: {} "
    "(mine.py:LINE) …; correct the reward so that it returns a number, or raise "
    "shaping.max_unscored"
)
REWARDS = {
    "import error": Case(
        "import nowhere_at_all  # here\n",
        "mine.py cannot be imported: ModuleNotFoundError: … (mine.py:LINE); install the package, "
        "or correct the name",
    ),
    "wrong signature": Case(
        "def score(prompts, completions):  # here\n    return []\n",
        "reward function 'score' (mine.py:LINE) has the wrong signature (…): write it as "
        "score(conversations), with one argument: a list of conversations",
    ),
    "wrong shape": Case(
        reward("return [[1.0] for _ in conversations]"),
        UNSCORED.format("TypeError: a score is of type list"),
    ),
    "wrong length": Case(
        reward("return [1.0]"),
        "reward function 'score' (mine.py:LINE) returned … scores for … conversations: return one "
        "number, or None, for each of them",
    ),
    "None": Case(reward("return [None for _ in conversations]"), UNSCORED.format("returned None")),
    "nan": Case(
        reward("return [float('nan') for _ in conversations]"),
        UNSCORED.format("a score is not finite"),
    ),
    "text for a number": Case(
        reward("return ['1.0' for _ in conversations]"),
        UNSCORED.format("TypeError: a score is of type str"),
    ),
    "exception": Case(
        "def score(conversations):\n    return [talk['text'] for talk in conversations]  # here\n",
        UNSCORED.format("TypeError: …"),
    ),
    "hang": Case(
        "import time\n\ndone = []\n\ndef score(conversations):\n    if not done:\n"
        "        done.append(1)\n        time.sleep(1)  # here\n"
        "    return [1.0 for _ in conversations]\n",
        "reward function 'score' (mine.py:…) has been running for … s (mine.py:LINE): to limit "
        "its time, set timeout in its entry of rewards",
        succeeds=True,
    ),
    "exit": Case(
        "import sys\n\ndef score(conversations):\n    sys.exit(3)  # here\n",
        UNSCORED.format("RuntimeError: called sys.exit(3)"),
    ),
    "changed argument": Case(
        reward("conversations[0].clear(); return [float(len(c)) for c in conversations]"),
        "reward function 'score' (mine.py:LINE) changes its argument conversations, which has no "
        "effect outside: it receives a copy; build a new value instead",
        succeeds=True,
    ),
    "not picklable": Case(
        reward("return [{1.0} for _ in conversations]"),
        UNSCORED.format(
            "TypeError: a value of type set cannot be passed between processes: return a list of "
            "numbers"
        ),
        {"rewards": [{"kind": "function", "path": "mine.py:score", "timeout": 60.0}]},
    ),
}


def environment(
    body: str, *, step: str = "def step(self, action):  # here", more: str = "pass"
) -> str:
    """A file with an environment."""
    head = """\
        import os
        import sys
        import time

        import gymnasium as gym
        import numpy as np


        class Env(gym.Env):
            observation_space = gym.spaces.Text(99)
            action_space = gym.spaces.Text(99)

            def __init__(self, words=()):
                MORE

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                return "Say a word.", {}

            STEP
                BODY
        """
    return textwrap.dedent(head).replace("MORE", more).replace("STEP", step).replace("BODY", body)


FAILED = (
    "the environment failed in the episode of seed …: {}; correct the environment, or drop such "
    "episodes with env.errors: count"
)
FIVE = "return observation, reward, terminated, truncated, info"
ENVIRONMENTS = {
    "import error": REWARDS["import error"],
    "wrong signature": Case(
        environment('return "", 1.0, True, False, {}', step="def step(self):  # here"),
        FAILED.format("TypeError: … (mine.py:LINE)"),
    ),
    "wrong shape": Case(
        environment('return "", np.ones(2), True, False, {}'),
        FAILED.format("TypeError: the reward is of type ndarray and shape (2,) (mine.py:LINE)"),
    ),
    "wrong length": Case(
        environment('return "", 1.0, True, {}'),
        FAILED.format(f"ValueError: step returned 4 values; {FIVE} (mine.py:LINE)"),
    ),
    "None": Case(
        environment("return None"),
        FAILED.format(f"TypeError: step returned a value of type NoneType; {FIVE} (mine.py:LINE)"),
    ),
    "nan": Case(
        environment('return "", float("nan"), True, False, {}'),
        FAILED.format("ValueError: the reward is nan (mine.py:LINE)"),
    ),
    "text for a number": Case(
        environment('return "", "1", True, False, {}'),
        FAILED.format("TypeError: the reward is of type str (mine.py:LINE)"),
    ),
    "exception": Case(
        environment("return 1 / 0  # here", step="def step(self, action):"),
        FAILED.format("ZeroDivisionError: division by zero (mine.py:LINE)"),
    ),
    "hang": Case(
        environment("time.sleep(5)  # here", step="def step(self, action):"),
        FAILED.format("TimeoutError: took longer than … s (mine.py:LINE)"),
        {"env": {"timeout": 0.3}},
    ),
    "exit": Case(
        environment("os._exit(0)  # here", step="def step(self, action):"),
        FAILED.format("RuntimeError: called sys.exit(0) (mine.py:LINE)"),
    ),
    "changed argument": Case(
        environment(
            'return "", 1.0, True, False, {}', step="def step(self, action):", more="words.pop()"
        ).replace("Env(gym.Env):", "Env(gym.Env):  # here"),
        "the constructor of mine.py:Env (mine.py:LINE) changes its argument env.kwargs, which has "
        "no effect outside: it receives a copy; build a new value instead",
        {"env": {"kwargs": {"words": ["a", "b"]}}},
        succeeds=True,
    ),
    "not picklable": Case(
        environment('return "", 1.0, True, False, {"check": lambda: 0}'),
        FAILED.format(
            "…; return values that can be pickled, or set env.concurrency: threads (mine.py:LINE)"
        ),
        {"env": {"concurrency": "processes"}},
    ),
}


def plugin(body: str, *, arguments: str = "logprobs, batch, settings, *, denominator") -> str:
    """A file with an algorithm; the location of a decorated function is that of the decorator."""
    return textwrap.dedent(f"""\
        import sys
        import time

        from rlhf.algorithms.metrics import MetricSums
        from rlhf.plugins import register_algorithm

        done = []

        @register_algorithm("mine", title="Mine")  # here
        def mine({arguments}):
            {body}
        """)


def elsewhere(code: str) -> str:
    """A plug-in whose only line "here" is in the body."""
    return code.replace('title="Mine")  # here', 'title="Mine")')


LOSS = "policy loss 'mine' (mine.py:LINE)"
SCALAR = "return the loss, a scalar tensor, and MetricSums"
PLUGINS = {
    "import error": REWARDS["import error"],
    "wrong signature": Case(
        plugin("return logprobs.sum(), MetricSums()", arguments="logprobs, batch"),
        f"plugins: mine.py cannot be imported: {LOSS} has the wrong signature (…): write it as "
        "loss(logprobs, batch, settings, *, denominator)",
    ),
    "wrong shape": Case(
        plugin("return logprobs, MetricSums()"),
        f"{LOSS} returned a loss of shape […]: {SCALAR}, such as aggregate(per_token, mask, ...)",
    ),
    "wrong length": Case(
        plugin("return logprobs.sum(), MetricSums(), 1"),
        f"{LOSS} returned a tuple of 3 values: {SCALAR}",
    ),
    "None": Case(plugin("logprobs.sum()"), f"{LOSS} returned a NoneType: {SCALAR}"),
    "nan": Case(
        plugin("return logprobs.sum() * float('nan'), MetricSums()"),
        f"{LOSS} returned the loss nan: check its divisions, logarithms and exponentials, and the "
        "values outside the mask",
    ),
    "text for a number": Case(
        plugin("return '1.0', MetricSums()"), f"{LOSS} returned (str, MetricSums): {SCALAR}"
    ),
    "exception": Case(
        elsewhere(plugin("return logprobs.sum() / settings.clipping, MetricSums()  # here")),
        "your code failed: AttributeError: … (mine.py:LINE); --debug shows the traceback",
    ),
    "hang": Case(
        elsewhere(
            plugin(
                "done or time.sleep(1); done.append(1)  # here\n"
                "            return logprobs.sum(), MetricSums()"
            )
        ),
        "policy loss 'mine' (mine.py:…) has been running for … s (mine.py:LINE): simplify it, or "
        "use tensor operations instead of loops",
        succeeds=True,
    ),
    "exit": Case(
        elsewhere(plugin("sys.exit(0)  # here")),
        "your code failed: RuntimeError: called sys.exit(0) (mine.py:LINE); --debug shows the "
        "traceback",
    ),
    "changed argument": Case(
        plugin("batch.advantages.mul_(2); return logprobs.sum(), MetricSums()"),
        f"{LOSS} changed batch.advantages in place, but other computations use this tensor: "
        "change a copy, such as batch.advantages.clone()",
    ),
    "not picklable": Case(
        elsewhere(plugin("return logprobs.sum(), MetricSums()"))
        + textwrap.dedent("""
            from rlhf import Callback

            class Keep(Callback):
                def state_dict(self):  # here
                    return {"check": lambda: 0}
            """),
        "callback mine.py:Keep: state_dict (mine.py:LINE) returned a state that cannot be saved "
        "(…): return numbers, texts, lists and dictionaries",
        {"callbacks": ["mine.py:Keep"]},
    ),
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Case]]] = {
    "reward": (
        "ppo",
        {"rewards": [{"kind": "function", "path": "mine.py:score"}]},
        REWARDS,
    ),
    "environment": (
        "ppo",
        {"env": {"id": "mine.py:Env", "kwargs": {}}, "rewards": []},
        ENVIRONMENTS,
    ),
    "plug-in": ("mine", {"plugins": ["mine.py"]}, PLUGINS),
}


def pattern_of(message: str, line: int | None = None) -> str:
    """The regular expression of a message with "…" for any text, and LINE for the line."""
    text = message if line is None else message.replace("LINE", str(line))
    return ".*".join(map(re.escape, text.split("…"))).replace("LINE", r"\d+")
