"""Mistakes in the other kinds of plug-ins: a file, a run, and the message.

The line that the message names has the comment "here" in the file.
"""

from __future__ import annotations

import textwrap
from typing import Any

from tests.helpers.user_code_mistakes import Case

_HEAD = "import os\nimport time\n\nimport torch\n\nfrom rlhf.plugins import *\n\ndone = []\n\n"
_WRONG = (
    "plugins: mine.py cannot be imported: {} (mine.py:LINE) has the wrong signature (…): write it "
    "as {}"
)
_SLOW = "done or time.sleep(1); done.append(1)"


def _file(code: str, **parts: str) -> str:
    """A plug-in; the parts replace the names in capitals in the code."""
    text = textwrap.dedent(code)
    for name, value in parts.items():
        text = text.replace(name, value)
    return _HEAD + text


def _advantage(body: str) -> str:
    code = """\
        from rlhf.algorithms.advantages import Advantages

        @register_advantage("mine", "mine")
        def mine(batch, settings):
            BODY
        """
    return _file(code, BODY=body)


def _kl(body: str) -> str:
    return _file(
        '@register_kl("mine", "mine")  # here\ndef mine(log_ratio):\n    BODY\n', BODY=body
    )


def _optimizer(body: str, *, arguments: str = "parameters, settings", here: str = "") -> str:
    code = f'@register_optimizer("mine"){here}\ndef mine({arguments}):\n    BODY\n'
    return _file(code, BODY=body)


def _step(body: str, *, here: str = "") -> str:
    code = f"""\
        class Mine(torch.optim.SGD):
            def step(self, closure=None):{here}
                BODY

        @register_optimizer("mine")
        def mine(parameters, settings):
            return Mine(parameters, lr=settings.learning_rate)
        """
    return _file(code, BODY=body)


def _tracker(log: str, *, arguments: str = "directory, config, step", here: str = "") -> str:
    code = f"""\
        @register_tracker("mine"){here}
        def mine({arguments}):
            def log(step, metrics):
                BODY
            return Tracker(log, lambda: None)
        """
    return _file(code, BODY=log)


def _callback(methods: str) -> str:
    code = '@register_callback("mine")\nclass Mine(Callback):\n    def METHODS\n'
    return _file(code, METHODS=methods)


def _data_format(body: str, *, arguments: str = "row, kind", here: str = "") -> str:
    code = f"""\
        @register_data_format("exam", columns=("task", "gold"), kinds=("sft",)){here}
        def read({arguments}):
            BODY
        """
    return _file(code, BODY=body)


def _reward_model(body: str, *, arguments: str = "self, chosen, rejected, margin") -> str:
    code = f"""\
        from rlhf.training.reward_models.preference import PairKind

        @register_reward_model("mine")
        class Mine(PairKind):
            def pair_losses({arguments}):  # here
                BODY
        """
    return _file(code, BODY=body)


def _command(body: str, *, arguments: str = "config: Config", here: str = "  # here") -> str:
    code = f"""\
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Config:
            name: str = "you"

        @register_command("mine", "mine"){here}
        def mine({arguments}):
            BODY
        """
    return _file(code, BODY=body)


def _engine(poll: str, *, options: str = ", length=2", here: str = "  # here") -> str:
    code = f"""\
        from rlhf.rollout.sampling.base import Completion, EngineBase, FinishReason

        @register_engine("mine")
        class Mine(EngineBase):
            def __init__(self, model, config{options}):
                self.requests = []

            def submit(self, requests):
                self.requests += requests

            def poll(self):{here}
                requests, self.requests = self.requests, []
                BODY

        def complete(r, tokens, logprobs, version):
            return Completion(r, tokens, logprobs, FinishReason.LENGTH, version)
        """
    return _file(code, BODY=poll)


def _completion(tokens: str, logprobs: str) -> str:
    return f"return [complete(r, {tokens}, {logprobs}, self.policy_version) for r in requests]"


_FAILED = "your code failed: {} (mine.py:LINE); --debug shows the traceback"
_EXIT = _FAILED.format("RuntimeError: called sys.exit(0)")
_POLL = "rollout.engine.kind mine: poll (mine.py:LINE) {}"
_TRACKER = (
    "tracker mine failed and receives no further metrics ({} (mine.py:LINE)); metrics.jsonl is "
    "complete"
)
_DROPPED = (
    "no usable row (… rows that do not have the exam format ({} (mine.py:LINE))); read as exam"
)
_PAIRS = "kind mine: pair_losses (mine.py:LINE) returned a {}: return a tensor of shape …"
_OUTPUT = "command 'mine' (mine.py:LINE) {}: write it as a generator: …"
_STATE = "callback mine: state_dict (mine.py:LINE) returned a state that cannot be saved ({}): …"

RUNS: dict[str, dict[str, Any]] = {
    "advantage": {"algorithm": {"advantage": "mine"}},
    "kl": {"algorithm": {"kl_estimator": "mine", "kl_placement": "loss"}},
    "optimizer": {"optimizer": {"name": "mine", "learning_rate": 1e-3}},
    "tracker": {"track": ["mine"]},
    "callback": {"callbacks": ["mine"]},
    "engine": {"rollout": {"engine": {"kind": "mine", "options": {"length": 2}}}},
}
"""Kind -> keys of an online run with the plug-in. The other kinds are read from files or print."""

PARTS: dict[str, dict[str, Case]] = {
    "advantage": {
        "nan": Case(
            _advantage("return Advantages(batch.scores() / 0 * 0)").replace(
                '"mine")', '"mine")  # here'
            ),
            "advantage estimator 'mine' (mine.py:LINE) returned the advantages nan: check its …",
        ),
        "changed argument": Case(
            _advantage("batch.old_logprobs.zero_(); return Advantages(batch.scores())").replace(
                '"mine")', '"mine")  # here'
            ),
            "advantage estimator 'mine' (mine.py:LINE) changed batch.old_logprobs in place, but "
            "other computations use this tensor: change a copy, such as "
            "batch.old_logprobs.clone()",
        ),
    },
    "kl": {
        "nan": Case(
            _kl("return log_ratio / 0 * 0"),
            "KL estimator 'mine' (mine.py:LINE) returned the KL nan: check its divisions, …",
        ),
        "wrong type": Case(
            _kl("return log_ratio.detach().numpy()"),
            "KL estimator 'mine' (mine.py:LINE) returned a ndarray of shape […]: return a tensor …",
        ),
        "changed argument": Case(
            _kl("return log_ratio.mul_(2)"),
            "KL estimator 'mine' (mine.py:LINE) changed log_ratio in place, but other "
            "computations use this tensor: change a copy, such as log_ratio.clone()",
        ),
    },
    "optimizer": {
        "wrong signature": Case(
            _optimizer("return None", arguments="parameters", here="  # here"),
            _WRONG.format("optimizer 'mine'", "mine(parameters, settings)"),
        ),
        "None": Case(
            _optimizer("pass", here="  # here"),
            "optimizer 'mine' (mine.py:LINE) returned a NoneType: return a torch.optim.Optimizer",
        ),
        "step with arguments": Case(
            _optimizer("return torch.optim.LBFGS(parameters)", here="  # here"),
            "optimizer 'mine' (mine.py:LINE): LBFGS.step has the wrong signature (…): write it as "
            "step(self, closure=None)",
        ),
        "exit": Case(_optimizer("os._exit(0)  # here"), _EXIT),
        "exit in a step": Case(_step("os._exit(0)  # here"), _EXIT),
        "hang": Case(
            _step(f"{_SLOW}  # here"),
            "the step of the optimizer (mine.py:…) has been running for … s (mine.py:LINE): …",
            succeeds=True,
        ),
    },
    "tracker": {
        "wrong signature": Case(
            _tracker("pass", arguments="directory", here="  # here"),
            _WRONG.format("tracker 'mine'", "mine(directory, config, step)"),
        ),
        "None": Case(
            _tracker("pass", here="  # here").replace("return Tracker", "Tracker"),
            _TRACKER.format("TypeError: it was opened as a NoneType, not as a Tracker"),
            succeeds=True,
        ),
        "changed argument": Case(
            _tracker("metrics.clear()", here="  # here"),
            "tracker mine (mine.py:LINE) changes its argument metrics, which has no effect "
            "outside: it receives a copy; build a new value instead",
            succeeds=True,
        ),
    },
    "callback": {
        "exception in state_dict": Case(
            _callback("state_dict(self):\n        return self.nothing  # here"),
            "callback mine failed in state_dict: AttributeError: … (mine.py:LINE); correct the "
            "callback",
        ),
        "exit in state_dict": Case(
            _callback("state_dict(self):\n        os._exit(0)  # here"),
            "callback mine failed in state_dict: RuntimeError: called sys.exit(0) (mine.py:LINE); "
            "correct the callback",
        ),
        "exit in the constructor": Case(
            _callback("__init__(self):\n        os._exit(0)  # here"),
            "callbacks: mine cannot be made: RuntimeError: called sys.exit(0) (mine.py:LINE)",
        ),
        "keys that change": Case(
            _callback("state_dict(self):  # here\n        return {1: 2}"),
            _STATE.format("the key 1 is not a text"),
        ),
        "values that change": Case(
            _callback("state_dict(self):  # here\n        return {'a': [(1, 2)]}"),
            _STATE.format("a value is of type tuple"),
        ),
        "wrong length": Case(
            _callback("state_dict(self):  # here\n        return [1]"),
            _STATE.format("it is a list"),
        ),
        "wrong signature": Case(
            _callback("state_dict(self, more):  # here\n        return {}"),
            "callbacks: mine: state_dict (mine.py:LINE) has the wrong signature (…): write it as "
            "state_dict(self)",
        ),
        "a name that is no text": Case(
            _callback("on_step(self, event):\n        event.log({3: 1.0})  # here"),
            "callback mine failed in on_step at step 1: ValueError: event.log: the name of a "
            "metric must be a text, got 3 (mine.py:LINE); correct the callback",
        ),
    },
    "data_format": {
        "wrong signature": Case(
            _data_format("yield {}", arguments="row", here="  # here"),
            _WRONG.format("data format 'exam'", "read(row, kind)"),
        ),
        "exception": Case(
            _data_format('yield {"prompt": row["tusk"]}  # here'),
            _DROPPED.format("KeyError: 'tusk'"),
        ),
        "None": Case(
            _data_format("row.keys()", here="  # here"),
            _DROPPED.format("TypeError: 'NoneType' object is not iterable"),
        ),
        "text": Case(
            _data_format('yield row["task"]', here="  # here"),
            _DROPPED.format("TypeError: a str was yielded, not a dictionary of cells"),
        ),
        "missing cell": Case(
            _data_format('yield {"promt": row["task"]}', here="  # here"),
            _DROPPED.format("KeyError: 'prompt'"),
        ),
        "exit": Case(_data_format("os._exit(0); yield  # here"), _EXIT),
    },
    "reward_model": {
        "wrong signature": Case(
            _reward_model("return chosen", arguments="self, chosen"),
            _FAILED.format("TypeError: …"),
        ),
        "wrong shape": Case(
            _reward_model("return (chosen - rejected).sum()"),
            _PAIRS.format("Tensor of shape []"),
        ),
        "None": Case(_reward_model("chosen - rejected"), _PAIRS.format("NoneType of shape []")),
        "no gradient": Case(
            _reward_model("return (rejected - chosen).detach()"),
            "kind mine: pair_losses (mine.py:LINE) returned a tensor without a gradient: …",
        ),
        "exit": Case(_reward_model("os._exit(0)  # here").replace("n):  # here", "n):"), _EXIT),
        "no kind": Case(
            _file('@register_reward_model("mine")  # here\nclass Mine:\n    pass\n'),
            "plugins: mine.py cannot be imported: reward model 'mine' (mine.py:LINE): derive the "
            "class from rlhf.training.reward_models.base.RewardKind",
        ),
    },
    "command": {
        "wrong signature": Case(
            _command("yield 'text'", arguments="config: Config, more"),
            _WRONG.format("command 'mine'", "command(config)"),
        ),
        "None": Case(_command("pass"), _OUTPUT.format("returned a NoneType")),
        "wrong type": Case(_command("yield 3"), _OUTPUT.format("yielded a int")),
        "text for a number": Case(
            _command("yield 'text'; return 'done'"), _OUTPUT.format("returned a str")
        ),
        "exit": Case(_command("os._exit(0); yield  # here", here=""), _EXIT),
    },
    "engine": {
        "wrong signature": Case(
            _engine("return []", options="", here="").replace('"mine")', '"mine")  # here'),
            "rollout.engine.kind mine (mine.py:…) has the wrong signature (got an unexpected "
            "keyword argument 'length'): write it as engine(model, config, *, option=...), and "
            "correct rollout.engine.options",
        ),
        "None": Case(
            _engine("return None"),
            _POLL.format("returned a NoneType: return a list of Completion"),
        ),
        "wrong length": Case(
            _engine(_completion("[1, 2]", "[-1.0]")),
            _POLL.format("returned 2 tokens with 1 log-probabilities: return a finite one for …"),
        ),
        "nan": Case(
            _engine(_completion("[1]", "[float('nan')]")),
            _POLL.format("returned 1 tokens with 1 log-probabilities: return a finite one for …"),
        ),
        "text for a number": Case(
            _engine(_completion("'a'", "[-1.0]")),
            _POLL.format("returned a completion whose tokens are not a list of int"),
        ),
        "no token": Case(
            _engine(_completion("[]", "[]")), _POLL.format("returned 0 tokens: return 1 to 3, …")
        ),
        "too many tokens": Case(
            _engine(_completion("[1] * 9", "[-1.0] * 9")),
            _POLL.format("returned 9 tokens: return 1 to 3, …"),
        ),
        "unknown token": Case(
            _engine(_completion("[10**6]", "[-1.0]")),
            _POLL.format("returned a token that is not one of the … ids of the model"),
        ),
        "twice": Case(
            _engine(_completion("[1]", "[-1.0]") + " * 2"),
            _POLL.format("returned a completion that was not requested, or a second one for …"),
        ),
        "unknown version": Case(
            _engine(
                "return [Completion(r, [1], [-1.0], FinishReason.LENGTH, -1) for r in requests]"
            ),
            _POLL.format("returned a completion with policy_version -1: return the version …"),
        ),
        "old version": Case(
            _engine("return [complete(r, [1], [-1.0], 0) for r in requests]"),
            _POLL.format("returned a completion with policy_version 0: return the version of …"),
        ),
        "no request": Case(
            _engine("return [complete(None, [1], [-1.0], 0)]"),
            _POLL.format("returned a completion that was not requested, or a second one for …"),
        ),
        "close": Case(
            _engine(
                f"{_completion('[1]', '[-1.0]')}\n\n    def close(self):\n        1 / 0  # here",
                here="",
            ),
            "rollout.engine.kind mine: close failed (ZeroDivisionError: … (mine.py:LINE))",
            succeeds=True,
        ),
        "exit": Case(_engine("os._exit(0)  # here", here=""), _EXIT),
        "hang": Case(
            _engine(f"{_SLOW}  # here\n        {_completion('[1]', '[-1.0]')}", here=""),
            "rollout.engine.kind mine: poll (mine.py:…) has been running for … s (mine.py:LINE): …",
            succeeds=True,
        ),
    },
}
"""Kind of plug-in -> mistake -> case."""
