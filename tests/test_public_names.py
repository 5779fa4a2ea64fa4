"""The public names are those that were promised (docs/extending.md, "Stability")."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import rlhf
from rlhf import plugins

PROMISED = Path(__file__).parent / "golden" / "public_names.txt"
"""One name in each line, such as ``rlhf.ppo``. A name is removed from the file one minor version
after it began to raise a DeprecationWarning."""


def test_the_public_names_are_those_of_the_file():
    """A new name is added to the file with the change that adds it."""
    found = {f"rlhf.{name}" for name in rlhf.__all__}
    found |= {f"rlhf.plugins.{name}" for name in plugins.__all__}
    assert sorted(found) == PROMISED.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", PROMISED.read_text(encoding="utf-8").splitlines())
def test_a_promised_name_can_be_used(name):
    module = plugins if name.startswith("rlhf.plugins.") else rlhf
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert getattr(module, name.rpartition(".")[2]) is not None
