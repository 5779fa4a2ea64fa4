"""Hostile programs are stopped at their limits, and later programs run."""

import os
import resource
import sys
from pathlib import Path

import pytest

from rlhf.reward_models import build, code_runner
from rlhf.reward_models.code_runner import CodeRunner, code_in


def confined() -> bool:
    """Whether this host can enforce every limit (Linux >= 6.2 on x86-64)."""
    try:
        CodeRunner()
    except ValueError:
        return False
    return True


needs_confinement = pytest.mark.skipif(not confined(), reason="this host cannot confine programs")


@pytest.fixture(scope="module")
def runner():
    return CodeRunner(cpu_seconds=1, wall_seconds=30.0)


@needs_confinement
@pytest.mark.parametrize(
    ("program", "status", "trace"),
    [
        ("while True: pass", "cpu", ""),
        ("import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True: pass", "cpu", ""),
        ("import os\nwhile True: os.fork()", "failed", "PermissionError"),
        ("import subprocess; subprocess.run(['ls'])", "failed", "PermissionError"),
        ("x = bytearray(10 << 30)", "failed", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "failed", "MemoryError"),
        ("import socket; socket.socket()", "failed", "PermissionError"),
        ("import socket; socket.socket(socket.AF_UNIX)", "failed", "PermissionError"),
        ("while True: print('x' * 100_000)", "output", "xxx"),
        ("for i in range(4000): open(f'{i}', 'wb').write(b'x' * (1 << 20))", "disk", ""),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", "failed", "OSError"),
        ("import os; os.kill(os.getppid(), 9)", "failed", "PermissionError"),
        ("print(open('/etc/passwd').read())", "failed", "PermissionError"),
        ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", "failed", "Error"),
    ],
)
def test_hostile_programs_are_stopped(program, status, trace):
    # Only endless programs get a short CPU limit; filling the memory also takes CPU time.
    runner = CodeRunner(cpu_seconds=1 if status == "cpu" else 20, wall_seconds=30.0)
    outcome = runner.run(program)
    assert outcome.status == status
    assert trace in outcome.output
    assert len(outcome.output) <= runner.output_kb << 10


@needs_confinement
@pytest.mark.parametrize(
    "attack",
    [
        "open({path!r}, 'w').write('x')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.unlink({path!r})",
        "import os; os.rename({path!r}, 'mine')",
        "import os; os.chmod({path!r}, 0o777)",
        "import os; os.utime({path!r}, (0, 0))",
        "import os; os.symlink({path!r}, 'link'); open('link', 'w').write('x')",
        "import os; os.mkdir({path!r} + '.d')",
    ],
)
def test_nothing_outside_its_folder_changes(runner, tmp_path, attack):
    path = tmp_path / "precious"
    path.write_text("precious")
    before = os.stat(path)
    outcome = runner.run(attack.format(path=str(path)))
    assert outcome.status == "failed"
    assert path.read_text() == "precious"
    assert (os.stat(path).st_mode, os.stat(path).st_mtime) == (before.st_mode, before.st_mtime)
    assert os.listdir(tmp_path) == ["precious"]


@needs_confinement
def test_sleeping_program_exceeds_the_wall_clock_limit():
    outcome = CodeRunner(wall_seconds=0.7).run("import time; time.sleep(60)")
    assert outcome.status == "deadline"


@needs_confinement
@pytest.mark.parametrize(
    "program",
    [
        "open('a', 'w').write('x'); assert open('a').read() == 'x'",
        "import threading as t; x = t.Thread(target=print); x.start(); x.join()",
        "import math, json, re, collections, itertools, random, datetime, functools, heapq",
        "import numpy; assert numpy.ones(3).sum() == 3",
    ],
)
def test_honest_programs_run(runner, program):
    assert runner.run(program).status == "passed"


@needs_confinement
@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("def f(x): return x + 1", "passed"),
        ("def f(x): return x", "failed"),
        ("def f(x) return x", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("print('passed')\nimport sys; sys.exit()", "failed"),
    ],
)
def test_only_tests_that_ran_to_their_end_pass(runner, program, status):
    assert runner.run(program, "assert f(1) == 2").status == status


@needs_confinement
def test_code_reward_works_after_hostile_programs(helpers):
    talk = helpers["talk"]
    reward = build({"kind": "code", "tests": "assert f(2) == 4", "cpu_seconds": 1})
    replies = [
        "Here:\n```python\nimport os\nwhile True: os.fork()\n```",
        "```python\ndef f(x): return x * x\n```",
        "```\nwhile True: pass\n```",
        "First\n```py\nno\n```\nbetter\n```python\ndef f(x): return 2 * x\n```\nDone.",
        "def f(x): return x",
    ]
    scores = reward.score([talk("square", reply) for reply in replies])
    assert scores.values == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert scores.unscored == 0


@needs_confinement
def test_deadline_is_no_score_and_tests_travel_as_a_fact(helpers):
    slow = helpers["talk"]("q", "import time; time.sleep(60)")
    quick = helpers["talk"]("q", "x = 1")
    quick[0]["tests"] = slow[0]["tests"] = "assert x == 1"
    reward = build({"kind": "code", "wall_seconds": 5.0})
    scores = reward.score([slow, quick, helpers["talk"]("q", "x = 1")])
    assert scores.values == [None, 1.0, None]
    assert scores.counts == {"code: deadline of 5 s": 1, "code: no reference answer": 1}


def test_host_without_confinement_needs_allow_unenforced(monkeypatch):
    sandbox = str(Path(code_runner.__file__).with_name("sandbox.py"))
    pretend = "import platform, runpy; platform.machine = lambda: 'riscv64'; "
    pretend += f"runpy.run_path({sandbox!r}, run_name='__main__')"
    monkeypatch.setattr(code_runner, "_COMMAND", [sys.executable, "-I", "-c", pretend])
    with pytest.raises(ValueError, match=r"cannot confine programs .*riscv64.*allow_unenforced"):
        CodeRunner()
    with pytest.raises(ValueError, match="cannot confine programs"):
        build({"kind": "code", "tests": "pass"})
    told = CodeRunner(allow_unenforced=True, cpu_seconds=1)
    assert told.run("x = 1", "assert x == 1").status == "passed"
    assert told.run("while True: pass").status == "cpu"


def test_limits_do_not_leak_into_this_process(runner):
    before = resource.getrlimit(resource.RLIMIT_AS)
    runner.run("pass")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("limits", [{"cpu_seconds": 0}, {"memory_mb": 10}, {"wall_seconds": -1.0}])
def test_invalid_limits_are_rejected(limits):
    with pytest.raises(ValueError, match="code: "):
        CodeRunner(**limits)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```", "x = 1\n"),
        ("```\nx\n```\n```Python\ny\n```", "y\n"),
        ("```js\nx\n```", "```js\nx\n```"),
    ],
)
def test_code_in(reply, code):
    assert code_in(reply) == code
