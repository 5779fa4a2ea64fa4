"""Twelve mistakes in rewards, environments and plug-ins: a message with file, line and advice.

Each case is a file and a run from the command line. The line that the message must name has the
comment "here". docs/troubleshooting.md has the messages of all cases.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

from rlhf.cli.main import main
from rlhf.common import user_code
from rlhf.common.foreign import describe_exception, user_location
from rlhf.common.user_code import definition_location, errors_located_at, thread_location
from rlhf.config.load import merge_trees
from tests.helpers.training import online_tree

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
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
        f"{LOSS} changed batch.advantages in place, which other computations use: change a copy, "
        "such as batch.advantages.clone()",
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


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_message_names_file_line_reason_and_what_to_do(
    kind: str,
    mistake: str,
    tmp_path: Path,
    echo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command, keys, cases = KINDS[kind]
    case = cases[mistake]
    monkeypatch.setattr(user_code, "SLOW_SECONDS", 0.3)
    (tmp_path / "mine.py").write_text(case.code)
    tree = online_tree(tmp_path / "run", echo_model, num_steps=1, episodes_per_step=4, **keys)
    tree = merge_trees(tree, {"rollout": {"parallel": 1}, "evaluation": {"episodes": 1}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(merge_trees(tree, case.keys)))
    code = main([command, "--config", str(tmp_path / "c.yaml")])
    output = capsys.readouterr().err + caplog.text
    (line,) = [n for n, text in enumerate(case.code.splitlines(), 1) if "# here" in text]
    assert code == (0 if case.succeeds else 2), output
    assert re.search(pattern_of(case.message, line), output), output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("kind", "mistake"), [(kind, mistake) for kind in KINDS for mistake in MISTAKES]
)
def test_the_message_is_in_the_documentation(kind: str, mistake: str) -> None:
    message = KINDS[kind][2][mistake].message.replace("LINE", "…")
    assert f"`{message}`" in PAGE.read_text(encoding="utf-8")


# Locations


class Callable_:
    def __call__(self) -> None: ...


def function() -> None: ...


@functools.wraps(function)
def wrapper() -> None: ...


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (function, function),
        (functools.partial(function), function),
        (wrapper, function),
        (Callable_(), Callable_.__call__),
        (Callable_().__call__, Callable_.__call__),
        (lambda: None, None),
        (len, False),
        (functools.partial(len), False),
        (gym.make, False),  # an installed package
        (describe_exception, False),  # this toolkit
        (3, False),
    ],
)
def test_the_location_of_a_definition(code: Any, expected: Any) -> None:
    place = definition_location(code)
    if expected is False:
        assert place is None
        return
    assert place is not None
    assert place[0] == __file__
    if expected is not None:
        assert place[1] == expected.__code__.co_firstlineno


def test_the_location_of_a_class_is_its_first_line() -> None:
    place = definition_location(Callable_)
    assert place is not None
    assert Path(__file__).read_text().splitlines()[place[1] - 1] == "class Callable_:"


def raised_by(call: Callable[[], Any], *codes: Any) -> Exception:
    with pytest.raises(Exception) as caught, errors_located_at(*codes):
        call()
    return caught.value


def test_a_line_in_the_traceback_comes_before_the_definition() -> None:
    error = raised_by(lambda: function(1), len, function)  # type: ignore[call-arg]
    place = user_location(error)
    assert place is not None
    assert place[1] != function.__code__.co_firstlineno


def test_the_line_of_a_thread() -> None:
    import threading

    place = thread_location(threading.get_ident())
    assert place is not None
    assert place[0] == __file__
    assert thread_location(None) is None
