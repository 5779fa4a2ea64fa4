"""Right programs get the score 1 under the confinement."""

import pytest

from rlhf.reward_models import build
from tests.helpers.confinement import needs_confinement
from tests.helpers.honest_programs import HONEST, NUMPY

pytestmark = needs_confinement
PROGRAMS = HONEST | NUMPY


@pytest.fixture(scope="module")
def reward():
    return build({"kind": "code"})


@pytest.mark.parametrize("name", PROGRAMS)
def test_honest_program_scores_one(name, reward, helpers):
    program, tests = PROGRAMS[name]
    conversation = helpers["talk"]("q", f"Here it is:\n```python\n{program}\n```\n")
    conversation[0]["tests"] = tests
    assert reward.score([conversation]).values == [1.0]


def test_there_are_fifty():
    assert len(HONEST) >= 50
