"""No attack on the code reward succeeds."""

import ctypes
import os

import pytest

from rlhf.reward_models.code_runner import CodeRunner
from tests.helpers.attacks import ATTACKS, SECRET
from tests.helpers.confinement import needs_confinement

pytestmark = needs_confinement


@pytest.fixture(scope="module")
def refused(request):
    """Names of the attacks that ran and whether they were refused; printed at the end."""
    results: dict[str, bool] = {}
    yield results
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nattacks: {len(results)} of {len(ATTACKS)} run, {sum(results.values())} refused")


@pytest.fixture(scope="module")
def runner():
    return CodeRunner(cpu_seconds=3, wall_seconds=30.0, memory_mb=256)


@pytest.fixture(scope="module")
def objects():
    """Ids of System V objects of this process, which programs must not reach."""
    libc = ctypes.CDLL(None)
    ids = {
        "shared": libc.shmget(0, 4096, 0o1600),
        "semaphore": libc.semget(0, 1, 0o1600),
        "queue": libc.msgget(0, 0o1600),
    }
    yield ids
    assert libc.shmctl(ids["shared"], 0, None) == 0
    assert libc.semctl(ids["semaphore"], 0, 0) == 0
    assert libc.msgctl(ids["queue"], 0, None) == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(name, refused, runner, objects, tmp_path, monkeypatch):
    monkeypatch.setenv("SANDBOX_SECRET", SECRET)
    precious, answers = tmp_path / "precious", tmp_path / "answers"
    precious.write_text("precious")
    answers.write_text(SECRET)
    before = os.stat(precious)
    program, trace, tests = ATTACKS[name]
    paths = {"precious": precious, "answers": answers, "trainer": os.getpid()} | objects

    outcome = runner.run(program.format(**paths), tests.replace("{{", "{").replace("}}", "}"))

    refused[name] = outcome.status in ("failed", "cpu", "output", "threads")
    assert refused[name], outcome
    assert trace in outcome.output
    assert SECRET not in outcome.output.partition("Traceback")[0]
    assert precious.read_text() == "precious"
    assert (os.stat(precious).st_mode, os.stat(precious).st_mtime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
    )
    assert sorted(os.listdir(tmp_path)) == ["answers", "precious"]


def test_attacks_are_distinct():
    assert len(ATTACKS) >= 40
    assert len({(program, tests) for program, _, tests in ATTACKS.values()}) >= len(ATTACKS) - 3
