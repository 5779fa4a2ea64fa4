"""From YAML and overrides to dataclasses: what is read, what is refused, and in which words."""

import ast
import copy
import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rlhf.cli.arguments import parse_arguments
from rlhf.commands.data_check import DataCheckConfig
from rlhf.commands.demos import DemosConfig
from rlhf.commands.generate import GenerateConfig
from rlhf.commands.models import AdapterMergeConfig
from rlhf.commands.pairs import PairsConfig
from rlhf.commands.report import ReportConfig
from rlhf.commands.score import ScoreConfig
from rlhf.commands.split import SplitConfig
from rlhf.config.data import DataSpec
from rlhf.config.evaluate import EvaluateConfig
from rlhf.config.load import (
    assemble_tree_and_load_plugins,
    build_config,
    merge_trees,
    read_yaml,
    set_dotted_key,
)
from rlhf.config.model import ModelSpec
from rlhf.config.offline import OfflineConfig
from rlhf.config.online import KLSpec, OnlineConfig
from rlhf.config.rollout import RolloutSpec
from rlhf.data.preferences import SimulatedAnnotator
from rlhf.errors import UserError
from tests.helpers.config_classes import dataclasses_of

CONFIGS = [
    OfflineConfig,
    OnlineConfig,
    EvaluateConfig,
    DemosConfig,
    SplitConfig,
    PairsConfig,
    GenerateConfig,
    ScoreConfig,
    DataCheckConfig,
]


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    count: int = 3


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    parts: list[Inner] = field(default_factory=list)
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    maybe: Inner | None = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name must not be 'bad'")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("-2e3", -2000.0),
        ("1.5e-3", 1.5e-3),
        (".5e1", 5.0),
        ("3", 3),
        ("0.25", 0.25),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
        ('"1e-5"', "1e-5"),
    ],
)
def test_floats_are_read_as_in_yaml_1_2(tmp_path, text, value):
    tree = read_yaml(write(tmp_path / "a.yaml", f"x: {text}\n"))
    assert tree["x"] == value
    assert type(tree["x"]) is type(value)
    assert parse_arguments(["--x", text]).overrides == (("x", value),)


def test_later_files_win_mappings_merge_and_lists_are_replaced(tmp_path):
    first = write(tmp_path / "a.yaml", "name: a\ninner: {rate: 1, count: 2}\nitems: [{}, {}]\n")
    second = write(tmp_path / "b.yaml", "inner: {rate: 5}\nitems: [{count: 9}]\n")
    tree = assemble_tree_and_load_plugins([first, second], [("inner.count", 7)])
    assert tree == {"name": "a", "inner": {"rate": 5, "count": 7}, "items": [{"count": 9}]}


def test_overrides_leave_a_mapping_alone():
    mapping = {"inner": {"rate": 1}}
    assert assemble_tree_and_load_plugins([mapping], [("inner.rate", 2)]) == {"inner": {"rate": 2}}
    assert mapping == {"inner": {"rate": 1}}


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge_trees(base, over) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}
    assert over == {"a": {"c": 2}}


def test_overrides_reach_into_lists_and_make_missing_mappings():
    tree = {"items": [{"rate": 1}, {"rate": 2}]}
    set_dotted_key(tree, "items.1.rate", 9)
    set_dotted_key(tree, "inner.deep.x", 3)
    assert tree == {"items": [{"rate": 1}, {"rate": 9}], "inner": {"deep": {"x": 3}}}


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("items.5.rate", "'5' is not an index of the list, which has 1"),
        ("items.x", "'x' is not an index"),
        ("items.²", "'²' is not an index"),
        ("name.sub", "name is not a mapping; its value is 'a'"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(key, part):
    with pytest.raises(UserError, match="--" + key.replace(".", r"\.")) as caught:
        set_dotted_key({"name": "a", "items": [{}]}, key, 1)
    assert part in str(caught.value)


def test_options_come_in_both_spellings():
    arguments = parse_arguments(
        ["--config", "a.yaml", "--b.c=[1, 2]", "--config=b.yaml", "--output-dir", "x"]
    )
    assert arguments.files == ("a.yaml", "b.yaml")
    assert arguments.overrides == (("b.c", [1, 2]), ("output_dir", "x"))


def test_arguments_without_a_flag_flags_and_switches():
    arguments = parse_arguments(["a", "--dry-run", "--resume", "b", "--json", "false", "--x=1"])
    assert arguments.positional == ("a", "b")
    assert arguments.has_any_flag("--dry-run")
    assert not arguments.has_any_flag("--help", "-h")
    assert arguments.overrides == (("resume", True), ("json", False), ("x", 1))


def test_arguments_without_a_flag_set_the_keys_of_the_row():
    def overrides(words, keys, config):
        return [
            call.overrides
            for call in parse_arguments(words).bind_positional_to_keys("x", keys, config)
        ]

    assert overrides(["a", "b"], ["directories"], ReportConfig) == [(("directories", ["a", "b"]),)]
    assert overrides(["a", "b"], ["path"], DataCheckConfig) == [(("path", "a"),), (("path", "b"),)]
    merge_keys = ["adapter", "target"]
    assert overrides(["a", "b"], merge_keys, AdapterMergeConfig) == [
        (("adapter", "a"), ("target", "b"))
    ]
    assert overrides([], ["path"], DataCheckConfig) == [()]
    files = parse_arguments(["a.yaml", "--config", "b.yaml"])
    (call,) = files.bind_positional_to_keys("x", ["config"], DataCheckConfig)
    assert call.files == ("a.yaml", "b.yaml")
    with pytest.raises(UserError, match="x: unexpected argument 'c'"):
        overrides(["a", "b", "c"], merge_keys, AdapterMergeConfig)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--key"], "--key needs a value"),
        (["--key", "[1"], "--key: '[1' is not valid YAML"),
    ],
)
def test_arguments_that_are_no_options_are_refused(arguments, part):
    with pytest.raises(UserError) as caught:
        parse_arguments(arguments)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: a\nitems: [1, 2\nmode: fast\n", "a.yaml:3: not valid YAML"),
        ("a: b: c\n", "a.yaml:1: not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of keys to values, got list"),
        ("just text\n", "expected a mapping of keys to values, got str"),
    ],
)
def test_files_that_hold_no_mapping_are_refused_with_their_line(tmp_path, text, part):
    with pytest.raises(UserError) as caught:
        read_yaml(write(tmp_path / "a.yaml", text))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\x89PNG\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_file_is_named_with_its_nearest_sibling(tmp_path):
    write(tmp_path / "quickstart.yaml", "")
    with pytest.raises(UserError, match=r"quickstrat\.yaml does not exist; did you mean 'quicks"):
        read_yaml(tmp_path / "quickstrat.yaml")


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    assert read_yaml(write(tmp_path / "a.yaml", "# nothing\n")) == {}


def test_a_tree_becomes_nested_dataclasses():
    tree = {"name": "a", "inner": {"rate": 1}, "parts": [{"count": 5}], "maybe": {"count": 1}}
    before = copy.deepcopy(tree)
    built = build_config(Outer, tree)
    assert tree == before
    assert built == Outer("a", Inner(1.0), [Inner(count=5)], maybe=Inner(count=1))
    assert isinstance(built.inner.rate, float)
    assert build_config(Outer, dataclasses.asdict(built)) == built


@pytest.mark.parametrize("text", ["yes", "off", "true", "null", "1e3", "007", "[1]", "a: b"])
def test_text_of_an_undeclared_type_stays_text(text):
    tree = {
        "output_dir": "x",
        "policies": [{"name": "random"}],
        "env": {"id": "text/Echo-v0", "kwargs": {"word": text, "list": [1, text, None]}},
        "rewards": [{"kind": "regex", "pattern": text}],
    }
    config = build_config(EvaluateConfig, tree)
    assert config.rewards == tree["rewards"]
    assert config.env is not None
    assert config.env.kwargs == tree["env"]["kwargs"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"nam": "a"}, "unknown key 'nam'; did you mean 'name'?"),
        ({"name": "a", "inner": {"rat": 1}}, "unknown key 'inner.rat'; did you mean 'rate'?"),
        (
            {"name": "a", "parts": [{}, {"cuont": 1}]},
            "unknown key 'parts.1.cuont'; did you mean 'count'?",
        ),
        ({"name": "a", "maybe": {"rates": 1}}, "unknown key 'maybe.rates'; did you mean 'rate'?"),
        (
            {"name": "a", "qqqq": 1},
            "unknown key 'qqqq'; the keys are name, inner, parts, mode, limit, maybe",
        ),
        ({"name": "bad"}, "name must not be 'bad'"),
        ({"name": None}, "name: has no value; give one"),
        (
            {"name": "a", "mode": None},
            "mode: has no value; remove the key to use its default",
        ),
    ],
)
def test_unknown_keys_are_refused_wherever_they_stand(tree, message):
    with pytest.raises(UserError) as caught:
        build_config(Outer, tree)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"name": "a", "inner": {"rate": "fast"}}, ["inner", "rate", "fast"]),
        ({"name": "a", "inner": {"count": 1.5}}, ["inner", "count", "1.5"]),
        ({"name": "a", "inner": {"count": True}}, ["inner.count must be a number", "True"]),
        ({"name": "a", "limit": True}, ["limit must be a number", "True"]),
        ({"name": "a", "limit": "many"}, ["limit", "many"]),
        ({"name": "a", "mode": "medium"}, ["mode", "medium"]),
        ({"name": "a", "inner": 3}, ["inner", "3", "rate"]),
        ({"name": "a", "parts": 3}, ["parts", "3"]),
        ({"name": "a", "parts": [{"count": "x"}]}, ["parts", "count", "x"]),
        ({"name": 5}, ["name", "5"]),
        ({}, ["name"]),
    ],
)
def test_wrong_types_are_told_in_one_line_with_key_and_value(tree, parts):
    with pytest.raises(UserError) as caught:
        build_config(Outer, tree)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    for part in parts:
        assert part in message


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_numpy_or_torch_refuse_are_refused(seed):
    with pytest.raises(UserError, match=r"seed must be (>=|<) "):
        build_config(DataCheckConfig, {"path": "a.jsonl", "seed": seed})


@dataclass
class Options:
    learning_rate: float = 0.1
    epochs: int = 1

    def __post_init__(self) -> None:
        raise RuntimeError("options of foreign classes are checked, never made")


@dataclass(frozen=True)
class WithOptions:
    trainer: dict = field(default_factory=dict)


def test_foreign_options_are_checked_without_being_made():
    built = build_config(WithOptions, {"trainer": {"learning_rate": 1}}, {"trainer": Options})
    assert built.trainer == {"learning_rate": 1.0}
    assert build_config(WithOptions, {}, {"trainer": Options}).trainer == {}


@pytest.mark.parametrize(
    ("trainer", "parts"),
    [
        ({"learning_rat": 1}, ["unknown key 'trainer.learning_rat'", "'learning_rate'"]),
        ({"epochs": "three"}, ["trainer", "epochs", "three"]),
        (3, ["trainer", "3"]),
        ([1], ["trainer", "1"]),
    ],
)
def test_foreign_options_are_refused_by_name(trainer, parts):
    with pytest.raises(UserError) as caught:
        build_config(WithOptions, {"trainer": trainer}, {"trainer": Options})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def undocumented(cls: type) -> list[str]:
    """Fields of a dataclass that no docstring follows, found in its source."""
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0].body  # type: ignore
    missing = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            missing += [] if is_doc else [ast.unparse(node.target)]
    return missing


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls):
    family = dataclasses_of(cls)
    assert {c.__name__: undocumented(c) for c in family if undocumented(c)} == {}
    assert all(c.__doc__ for c in family)


def test_the_walk_over_dataclasses_finds_the_nested_ones():
    assert {OnlineConfig, ModelSpec, DataSpec} <= dataclasses_of(OnlineConfig)
    assert SimulatedAnnotator in dataclasses_of(PairsConfig)
    assert undocumented(Inner) == ["rate", "count"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Repeat: apple", "Repeat: apple"),
        ("- not a list", "- not a list"),
        ("what: is: this", "what: is: this"),
        ("{a: 1}", {"a": 1}),
        ("[1, 2]", [1, 2]),
        ("1e-5", 1e-5),
        ("null", None),
    ],
)
def test_text_with_a_colon_stays_text(text, value):
    assert parse_arguments(["--prompt", text]).overrides == (("prompt", value),)


@pytest.mark.parametrize("name", ["target", "horizon"])
def test_the_kl_controller_needs_positive_numbers(name):
    with pytest.raises(UserError, match=f"{name} must be (> 0|>= 1), got -1"):
        build_config(KLSpec, {name: -1})


def test_a_temperature_whose_division_overflows_float32_is_refused():
    """The largest float32 is 3.4e38: logits of 100 overflow at temperatures below 3e-37."""
    for temperature in (1e-300, 1e-38, 9e-4):
        with pytest.raises(ValueError, match=r"use 0 \(greedy\) or at least 0\.001"):
            RolloutSpec(temperature=temperature)
    assert [RolloutSpec(temperature=t).temperature for t in (0.0, 1e-3)] == [0.0, 1e-3]
