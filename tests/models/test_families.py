"""Families of models through every stage: right, or refused in one line."""

import pytest

from tests.models.families import FAMILIES
from tests.models.sweep import PAGE, STAGES, run_family

# What README's test command runs: an attention window, states, experts, a head of its own, a table
# that is tied, one that is refused.
FIXED = ("gemma3_text", "qwen3_next", "falcon_h1", "bart")


def check(name: str) -> None:
    """Fail where a stage of a family ends in a traceback, or is wrong without saying so."""
    for stage, outcome in run_family(name).items():
        assert outcome.traceback is None, f"{name} {stage}: {outcome.traceback}"
        assert not outcome.silent, f"{name} {stage}: {outcome.error:.1e}"
        if outcome.refused:
            assert len(outcome.refused.splitlines()) == 1, f"{name} {stage}: {outcome.refused}"


@pytest.mark.parametrize("name", FIXED)
def test_family_is_correct_in_all_stages_or_refused(name):
    check(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAMILIES)
def test_all_families_are_correct_in_all_stages_or_refused(name):
    check(name)


def test_the_page_has_every_family():
    text = PAGE.read_text()
    assert f"| family | {' | '.join(STAGES)} |" in text
    told = text.partition("<!-- table")[2]
    assert [name for name in FAMILIES if name not in told] == []
    assert "TRACEBACK" not in told
    assert len(FAMILIES) >= 90
