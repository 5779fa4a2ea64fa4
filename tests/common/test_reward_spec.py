"""The keys of a reward are checked in the configuration of every command."""

import typing

import pytest

from rlhf.cli.table import COMMANDS
from rlhf.common.imports import import_object
from rlhf.common.ranges import convert_to_type
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.chat import ChatConfig
from rlhf.config.load import build_config
from rlhf.errors import UserError


def test_every_list_of_rewards_in_a_command_has_this_type():
    hints = {
        (command.config, key): hint
        for command in COMMANDS.values()
        for key, hint in typing.get_type_hints(import_object(command.config)).items()
        if key in ("rewards", "gold")
    }
    assert len(hints) >= 10
    assert set(hints.values()) == {list[RewardSpec]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "length", "weight": "x"}, "rewards.0.weight must be a valid number, got 'x'"),
        ({"kind": "length", "weight": True}, "rewards.0.weight must be a number, got True"),
        (
            {"kind": "length", "clip": [2, 1]},
            "rewards.0.clip must be [LOW, HIGH] with LOW < HIGH, got [2, 1]",
        ),
        (
            {"kind": "length", "name": None},
            "rewards.0.name: has no value; remove the key to use its default",
        ),
        ({"weight": 1.0}, "rewards.0.kind is required"),
        ({"kind": None}, "rewards.0.kind: has no value; give one"),
        (
            {"kind": "length", 1: 2},
            "rewards.0.1 must be a valid string, got 1; YAML reads some texts as other values "
            'unless they are in quotes: "no"',
        ),
        (
            "length",
            "rewards.0: expected a mapping with kind, name, normalize, clip, threshold, weight; "
            "got 'length'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key(spec, message):
    with pytest.raises(UserError) as error:
        build_config(ChatConfig, {"models": ["x"], "rewards": [spec]})
    assert str(error.value) == message


def test_a_value_that_is_no_list_gets_the_hint_on_lists():
    with pytest.raises(UserError, match=r"^rewards must be a valid list, got 'length'; write a li"):
        build_config(ChatConfig, {"models": ["x"], "rewards": "length"})


def test_settings_of_a_kind_are_kept_unchanged():
    settings = {"low": 3, "path": None, "nested": {"kind": "x", "weight": "text"}, "list": [1, "a"]}
    spec = {"kind": "anything", "weight": 2, **settings}
    assert convert_to_type(list[RewardSpec], [spec], "rewards") == [spec]
