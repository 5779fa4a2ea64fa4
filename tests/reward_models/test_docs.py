"""The table of docs/rewards.md names every kind."""

from pathlib import Path

import pytest

from rlhf.reward_models import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_in_the_table(kind):
    assert f"| `{kind}` |" in PAGE
