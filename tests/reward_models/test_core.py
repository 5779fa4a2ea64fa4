import json
import math
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rlhf.common.user_code import definition_location_text
from rlhf.errors import UserError
from rlhf.reward_models import Reward, Scores, as_reward, as_trl, build
from rlhf.reward_models.core import PerConversationReward, SetupError, Unscorable, last_reply
from rlhf.reward_models.worker import FunctionWorker


def talk(reply: str, **facts: str):
    return [{"role": "user", "content": "q", **facts}, {"role": "assistant", "content": reply}]


def value_of(name: str = "value") -> Reward:
    """Scores a reply by its number; the reply "none" has no score."""

    def read(conversation):
        text = last_reply(conversation)
        if text == "none":
            raise Unscorable("asked for none")
        return float(text)

    return PerConversationReward(read, name=name)


REPLIES = [talk("2"), talk("none"), talk("-3")]


def test_import_loads_neither_torch_nor_the_other_packages():
    others = "{'torch', 'rlhf.envs', 'rlhf.rollout'}"
    code = f"import rlhf.reward_models, sys; print({others} & set(sys.modules))"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (value_of() + 1, [3, None, -2]),
        (1 + value_of(), [3, None, -2]),
        (value_of() * 0.5, [1, None, -1.5]),
        (2 * value_of() - 1, [3, None, -7]),
        (1 - value_of(), [-1, None, 4]),
        (-value_of(), [-2, None, 3]),
        (value_of("a") + value_of("b"), [4, None, -6]),
        (value_of("a") * value_of("b"), [4, None, 9]),
        (value_of("a") - 2 * value_of("b"), [-2, None, 3]),
        (value_of().clip(-1, 1), [1, None, -1]),
        (value_of().threshold(2), [1, None, 0]),
        (value_of().normalize(1.0, 2.0), [0.5, None, -2]),
        (value_of().clip(-1, 1) * 3, [3, None, -3]),
    ],
)
def test_composition(reward, expected):
    assert reward(REPLIES) == expected


def test_none_is_counted_with_its_reason_and_is_never_zero():
    scores = (value_of("a") * 0.0 + value_of("b")).score(REPLIES)
    assert scores.values[1] is None
    assert scores.unscored == 1
    assert scores.counts == {"a: asked for none": 1, "b: asked for none": 1}


def test_components_hold_the_raw_score_of_every_leaf():
    scores = (10 * value_of("a").clip(0, 1) + value_of("b") * value_of("c")).score(REPLIES)
    raw = [2.0, None, -3.0]
    assert scores.components == {"a": raw, "b": raw, "c": raw}


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="2 rewards are named 'value'"):
        _ = value_of() + value_of()
    same = value_of()
    assert (same + same)([talk("2")]) == [4.0]


def test_gate_scores_only_what_it_lets_through():
    asked = []

    def costly(conversations):
        asked.extend(last_reply(c) for c in conversations)
        return [100.0] * len(conversations)

    gated = as_reward(costly).gate(value_of(), at_least=2, otherwise=-1)
    scores = gated.score([talk("2"), talk("1"), talk("none"), talk("5")])
    assert scores.values == [100.0, -1.0, None, 100.0]
    assert scores.components["costly"] == [100.0, None, None, 100.0]
    assert asked == ["2", "5"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_becomes_none(bad):
    scores = Scores([1.0, bad], {"part": [bad, 0.0]})
    assert scores.values == [1.0, None]
    assert scores.components == {"part": [None, 0.0]}


def test_components_of_another_length_are_refused():
    with pytest.raises(ValueError, match="'part' has 1 scores"):
        Scores([1.0, 2.0], {"part": [1.0]})


def test_function_that_raises_loses_one_score():
    def fragile(conversations):
        return [1.0 / float(last_reply(c)) for c in conversations]

    scores = as_reward(fragile).score([talk("2"), talk("0"), talk("4")])
    assert scores.values == [0.5, None, 0.25]
    line = fragile.__code__.co_firstlineno + 1
    reason = f"fragile: ZeroDivisionError: float division by zero (test_core.py:{line})"
    assert scores.counts == Counter([reason])


def test_rule_that_raises_loses_one_score_and_reports_its_line():
    """A missing package ends the batch."""

    def fragile(conversation):
        return [1.0, 2.0][int(last_reply(conversation))]

    scores = PerConversationReward(fragile, name="fragile").score([talk("1"), talk("7"), talk("x")])
    assert scores.values == [2.0, None, None]
    line = fragile.__code__.co_firstlineno + 1
    assert set(scores.counts) == {
        f"fragile: IndexError: list index out of range (test_core.py:{line})",
        f"fragile: ValueError: invalid literal for int() with base 10: 'x' (test_core.py:{line})",
    }

    def unprepared(conversation):
        raise SetupError("no such package")

    with pytest.raises(SetupError):
        PerConversationReward(unprepared, name="unprepared").score([talk("1")])


def test_every_missing_score_has_a_reason():
    """In sums, gates and functions, and for values that are not finite."""
    why = "value: asked for none"
    first, second = value_of(), as_reward(lambda cs: [None, 1.0, float("nan")], name="second")
    place = definition_location_text(second.function)  # type: ignore[attr-defined]
    assert place.startswith(" (test_core.py:")
    assert first.score(REPLIES).reasons == [None, why, None]
    assert (first * 2 + second).score(REPLIES).reasons == [
        f"second: returned None{place}",
        why,
        f"second: a score is not finite{place}",
    ]
    gate = as_reward(lambda cs: [1.0, 1.0, None], name="gate")
    reasons = first.gate(gate).score(REPLIES).reasons
    place = definition_location_text(gate.function)  # type: ignore[attr-defined]
    assert reasons == [None, why, f"gate: returned None{place}"]
    assert Scores([1.0, None]).reasons == [None, "no score"]
    with pytest.raises(ValueError, match="1 reasons for 2 scores"):
        Scores([1.0, None], reasons=["x"])


def test_the_line_of_a_crash_is_the_users_own():
    """The deepest frame outside installed packages and the standard library."""

    def parse(conversations):
        return [float(json.loads(last_reply(c))) for c in conversations]

    line = parse.__code__.co_firstlineno + 1
    [reason] = as_reward(parse).score([talk("{")]).counts
    assert reason.startswith("parse: JSONDecodeError: ")
    assert reason.endswith(f"(test_core.py:{line})")


def test_an_exception_without_a_text_is_counted():
    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError

    def fails(conversations):
        raise Unprintable

    [reason] = as_reward(fails).score([talk("a")]).counts
    assert reason.startswith("fails: Unprintable (test_core.py:")


def test_the_reason_of_a_missing_score_has_no_secrets():
    """Reasons are written to samples.jsonl and metrics.jsonl."""

    def fails(conversations):
        raise ValueError("Incorrect API key provided: sk-hunter2-hunter2hunter2")

    [reason] = as_reward(fails).score([talk("a")]).counts
    assert reason.startswith("fails: ValueError: Incorrect API key provided: *** (test_core.py:")


def test_a_function_returning_too_few_scores_is_an_error():
    with pytest.raises(ValueError, match="returned 1 scores for 2"):
        as_reward(lambda conversations: [1.0])([talk("1"), talk("2")])


def test_prefer_is_the_sigmoid_of_the_difference_over_temperature():
    reward = value_of()
    reward.temperature = 2.0
    [p, unknown] = reward.prefer([talk("3"), talk("none")], [talk("1"), talk("1")])
    assert p == pytest.approx(1 / (1 + math.exp(-1)))
    assert unknown is None
    assert reward.prefer([talk("-2000")], [talk("2000")]) == [0.0]


def test_trl_function_takes_text_and_messages_and_passes_columns_as_facts():
    seen = []

    def spy(conversations):
        seen.extend(conversations)
        return [1.0, None]

    function = as_trl(as_reward(spy))
    prompts = ["6*7?", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]]
    completions = ["42", [{"role": "assistant", "content": "a"}]]
    out = function(prompts, completions, answer=["42", "x"], trainer_state=object())
    assert out == [1.0, None]
    assert function.__name__ == "spy"
    assert seen[0] == [
        {"role": "user", "content": "6*7?", "answer": "42"},
        {"role": "assistant", "content": "42"},
    ]
    assert seen[1] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "answer": "x"},
        {"role": "assistant", "content": "a"},
    ]


def test_trl_function_passes_every_json_value_and_no_key_with_a_meaning():
    seen = []
    function = as_trl(as_reward(lambda cs: [seen.extend(cs), [0.0]][1]))
    case = {"in": [1], "out": None}
    columns = {"case": [case], "level": [None], "content": ["other"], "role": ["system"]}
    columns |= {"name": ["n"], "completion_ids": [[3, 4]], "environments": [object()]}
    assert function(["q"], ["r"], **columns) == [0.0]
    assert seen[0][0] == {"role": "user", "content": "q", "case": case, "level": None}


@pytest.mark.parametrize("kind", ["exact_match", "number", "math"])
def test_trl_function_passes_numbers_as_numbers(kind):
    function = as_trl(build({"kind": kind}))
    scores = function(["6*7?"] * 3, ["42", "42", "43"], answer=[42.0, 42, 42.0])
    assert scores == [1.0, 1.0, 0.0]
    assert function(["6*7?"], ["nan"], answer=[float("nan")]) == [None]


@pytest.fixture
def importable(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "import time\n"
        "def shout(cs): return [float(c[-1]['content'].isupper()) for c in cs]\n"
        "def hang(cs):\n"
        "    if cs[0][-1]['content'] == 'hang': time.sleep(60)\n"
        "    return [1.0]\n"
        "class One:\n"
        "    def __call__(self, cs): return [1.0]\n"
        "one = One()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards_for_test"


def test_build_sums_specs_with_weights_and_names(importable):
    reward = build(
        [
            {"kind": "function", "path": f"{importable}:shout", "weight": 3.0},
            {"kind": "regex", "pattern": "a", "name": "has_a", "weight": -1},
            {"kind": "regex", "pattern": "A", "name": "has_A"},
        ]
    )
    scores = reward.score([talk("AA"), talk("a")])
    assert scores.values == [4.0, -1.0]
    assert scores.components == {"shout": [1.0, 0.0], "has_a": [0.0, 1.0], "has_A": [1.0, 0.0]}


def test_build_applies_normalize_then_clip_then_weight(importable):
    spec = {"kind": "function", "path": f"{importable}:shout"}
    reward = build(spec | {"normalize": {"mean": -3, "std": 2}, "clip": [0, 1.75], "weight": 2})
    assert reward([talk("A"), talk("a")]) == [3.5, 3.0]


def test_build_gate(importable):
    spec = {
        "kind": "gate",
        "reward": {"kind": "length", "low": 4},
        "condition": {"kind": "regex", "pattern": "ok"},
        "otherwise": -5.0,
    }
    assert build(spec)([talk("ok then"), talk("no")]) == [-0.5, -5.0]


def test_a_function_with_a_deadline_is_killed_and_the_next_text_is_scored(importable):
    reward = build({"kind": "function", "path": f"{importable}:hang", "timeout": 3.0})
    scores = reward.score([talk("a"), talk("hang"), talk("b")])
    assert scores.values == [1.0, None, 1.0]
    assert scores.counts == {
        "hang: TimeoutError: took longer than 3 s (my_rewards_for_test.py:4)": 1
    }


def test_a_callable_object_with_a_deadline_has_the_name_of_its_class(importable):
    assert build({"kind": "function", "path": f"{importable}:one", "timeout": 3.0}).name == "One"


def test_a_signal_to_all_processes_does_not_cost_a_score(importable):
    """Ctrl-C in a terminal reaches the worker too, and the run still finishes its step."""
    worker = FunctionWorker(f"{importable}:hang", timeout=60.0)
    assert worker([talk("a")]) == [1.0]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        worker._process.send_signal(number)
    assert worker([talk("b")]) == [1.0]
    worker.close()


@pytest.mark.parametrize("bounds", [[-0.5, 1], (-0.5, 1), [-0.5, float("inf")]])
def test_the_limits_of_a_score_can_be_a_tuple_or_one_sided(bounds):
    reward = build({"kind": "length", "low": 10, "high": 20, "clip": bounds})
    assert reward([talk("a b c")]) == [-0.5]  # without limits 3 / 10 - 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "lenght"}, "unknown kind 'lenght'; did you mean 'length'"),
        ({"kind": "length", "hihg": 3}, "no setting 'hihg'; did you mean 'high'"),
        ({"kind": "regex"}, "needs the setting 'pattern'"),
        ({"pattern": "x"}, r"^reward\.kind is required; known kinds: .*, length, "),
        ([{"kind": "length"}, {}], r"^rewards\.1\.kind is required; known kinds: "),
        (
            {
                "kind": "gate",
                "reward": {"kind": "length"},
                "condition": {"kind": "length", "clip": 1},
            },
            r"^gate\.condition\.clip must be \[LOW, HIGH\]",
        ),
        ({"kind": "function", "pathh": "x"}, "no setting 'pathh'; did you mean 'path'"),
        ({"kind": "regex", "pattern": "("}, "not a regular expression"),
        ({"kind": "function", "path": "no_such_module_here:f"}, "cannot import"),
        ({"kind": "function", "path": "math:sqroot"}, "did you mean"),
        ({"kind": "function", "path": "math"}, "module:name"),
        (
            {"kind": "length", "clip": 3},
            r"^reward\.clip must be \[LOW, HIGH\] with LOW < HIGH, got 3$",
        ),
        ({"kind": "length", "clip": [1, -1]}, r"clip must be \[LOW, HIGH\] with LOW < HIGH"),
        ({"kind": "length", "clip": [0, 1, 2]}, r"clip must be \[LOW, HIGH\] with LOW < HIGH"),
        ({"kind": "length", "clip": [True, 2]}, r"clip\.0 must be a number, got True"),
        ({"kind": "length", "normalize": {"mean": 1}}, r"normalize must be true or \{mean: NUM"),
        ({"kind": "length", "normalize": {"mean": 1, "std": 0}}, r"NUMBER > 0\}, got"),
        ({"kind": "length", "normalize": {"mean": "1", "std": 1}}, "normalize must be true or"),
        ({"kind": "length", "normalize": False}, "normalize must be true or"),
        ({"kind": "length", "normalize": True}, "has no stored mean and std"),
        ({"kind": "length", "low": "a"}, "low must be of type int, got 'a'"),
        ({"kind": "regex", "pattern": 3}, "pattern must be of type str, got 3"),
        ({"kind": "learned", "path": "x", "dtype": "fp32"}, "dtype must be one of float32"),
        ({"kind": "number", "tolerance": float("nan")}, "tolerance must be >= 0"),
        ({"kind": "length", "weight": "x"}, r"^reward\.weight must be a valid number, got 'x'$"),
        ({"kind": "length", "weight": True}, r"^reward\.weight must be a number, got True$"),
        ([{"kind": "length", "weight": float("nan")}], r"^rewards\.0\.weight must be a finite num"),
        ({"kind": "length", "threshold": [1]}, r"^reward\.threshold must be a valid number"),
        ({"kind": "length", "clip": ["a", 1]}, r"clip must be \[LOW, HIGH\] with LOW < HIGH, got"),
        ({"kind": "length", "name": 3}, r"^reward\.name must be a valid string, got 3; YAML"),
        ({"kind": ["length"]}, r"^reward\.kind must be a valid string"),
        (["length"], r"^rewards\.0 must be a valid mapping, got 'length'"),
        ([], "list is empty"),
        ([{"kind": "length"}, {"kind": "length"}], "2 rewards are named 'length'"),
    ],
)
def test_mistakes_in_a_configuration_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        build(spec)
