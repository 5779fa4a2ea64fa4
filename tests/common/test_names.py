"""Nearest names and objects imported by name."""

import pytest

from rlhf.common.imports import import_object
from rlhf.common.names import closest_name, did_you_mean
from rlhf.errors import UserError


def test_nearest_name():
    assert (
        did_you_mean("learning_rat", ["epochs", "learning_rate"])
        == "; did you mean 'learning_rate'?"
    )
    assert did_you_mean("zzz", ["epochs"]) == ""
    assert closest_name("epoch", ["epochs"], cutoff=0.99) is None


def test_import_object_reaches_into_attributes():
    assert import_object("json:dumps")({}) == "{}"
    assert import_object("pathlib:Path.home").__name__ == "home"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json", "rewards: write the path as module:name or as file.py:name, got 'json'"),
        ("jsonn:dumps", "rewards: cannot import 'jsonn'"),
        ("json:dump_s", "rewards: 'json:dump_s' does not exist; did you mean 'dumps'?"),
    ],
)
def test_import_object_names_the_mistake(path: str, message: str):
    with pytest.raises(UserError) as caught:
        import_object(path, what="rewards")
    assert str(caught.value).startswith(message)
