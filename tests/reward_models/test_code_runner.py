"""Programs run under limits; the reward, its statuses and its settings."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.reward_models import build, code_runner
from rlhf.reward_models.chat_template import split_reasoning
from rlhf.reward_models.code_runner import CodeRunner, code_of_reply
from tests.helpers.confinement import needs_confinement


@pytest.fixture(scope="module")
def runner():
    return CodeRunner(cpu_seconds=1, wall_seconds=30.0)


@needs_confinement
@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: pass", "cpu"),
        ("import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True: pass", "cpu"),
        ("while True: print('x' * 100_000)", "output"),
        ("x = bytearray(10 << 30)", "failed"),
        (
            "import threading, time; threading.stack_size(32768)\n"
            "for _ in range(80): threading.Thread(target=time.sleep, args=(20,)).start()\n"
            "time.sleep(20)",
            "threads",
        ),
    ],
)
def test_status_names_the_limit(runner, program, status):
    outcome = runner.run(program)
    assert outcome.status == status
    assert len(outcome.output) <= runner.output_kb << 10


@needs_confinement
def test_sleeping_program_exceeds_the_wall_clock_limit():
    outcome = CodeRunner(wall_seconds=0.7).run("import time; time.sleep(60)")
    assert outcome.status == "deadline"


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
@pytest.mark.parametrize(
    "tests",
    ["raise SystemExit(0)", "import sys; sys.exit()", "assert f(1) == 2\nexit(0)", "def"],
)
def test_tests_that_end_early_do_not_pass(runner, tests):
    assert runner.run("def f(x): return x + 1", tests).status == "failed"


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
    assert scores.counts == {
        "code: exceeded the wall-clock limit of 5 s": 1,
        "code: no reference answer": 1,
    }


class DelayedStart(str):
    """The start of both processes; one of them starts later, as on a busy machine."""

    delayed: str

    def format(self, folder, role):
        delay = "import time; time.sleep(0.5); " if role == self.delayed else ""
        return delay + super().format(folder, role)


@pytest.mark.parametrize("delayed", ["program", "checker"])
def test_host_without_confinement_needs_allow_unenforced(monkeypatch, delayed):
    pretend = "import platform; platform.machine = lambda: 'riscv64'; "
    start = DelayedStart(pretend + code_runner._START)
    start.delayed = delayed
    monkeypatch.setattr(code_runner, "_START", start)
    with pytest.raises(UserError, match=r"cannot confine programs .*riscv64.*allow_unenforced"):
        CodeRunner()
    with pytest.raises(UserError, match="cannot confine programs"):
        build({"kind": "code", "tests": "pass"})
    unconfined = CodeRunner(allow_unenforced=True, cpu_seconds=1)
    assert unconfined.run("x = 1", "assert x == 1").status == "passed"
    assert unconfined.run("while True: pass").status == "cpu"


@needs_confinement
def test_programs_end_with_the_trainer():
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from rlhf.reward_models.code_runner import CodeRunner\n"
            "print(flush=True); CodeRunner().run('import time; time.sleep(60)')",
        ],
        stdout=subprocess.PIPE,
    )
    with trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        children = _wait_for(lambda: _children(trainer.pid), lambda pids: len(pids) == 2)
        trainer.kill()
    _wait_for(lambda: [pid for pid in children if _runs(pid)], lambda pids: not pids)


def _wait_for(measure, is_reached):
    for _ in range(600):
        if is_reached(result := measure()):
            return result
        time.sleep(0.05)
    raise AssertionError(f"still {result} after 30 s")


def _stat(pid):
    """State and parent of a process; None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None


def _children(parent):
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (stat := _stat(pid)) and stat[1] == str(parent)]


def _runs(pid):
    stat = _stat(pid)
    return stat is not None and stat[0] != "Z"


@needs_confinement
def test_runs_leave_no_descriptors_threads_or_processes(runner):
    def count():
        pid = os.getpid()
        return (
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(_children(pid)),
        )

    runner.run("pass")
    before = count()
    for program in ("pass", "1 / 0", "while True: print('x' * 100_000)"):
        runner.run(program)
    assert count() == before


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
    assert code_of_reply(reply) == code


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("1. ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
        (
            '```python\ndef f():\n    """Use:\n\n    ```\n    f()\n    ```\n    """\n```',
            'def f():\n    """Use:\n\n    ```\n    f()\n    ```\n    """\n',
        ),
        ("```python\nx = 1\n     ```\nDone.", "x = 1\n"),
        ("```python\ns = 'a\u2028b\x85c\x1cd'\n```", "s = 'a\u2028b\x85c\x1cd'\n"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\n"),
        ("> So:\n> ```python\n> def f():\n>     pass\n> ```\n", "def f():\n    pass\n"),
        ("> ```python\n> x = 1\n\nText\n```\ny\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```pycon\n>>> x\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```python\n>>> x\n1\n```", "x = 1\n"),
        ("<think>\nno\n</think>\n<answer>```python\nx = 1\n```</answer>", "x = 1\n"),
        ("<answer>\nx = 1\n</answer>", "\nx = 1\n"),
        ("```python\ns = '<answer>y</answer>'\n```", "s = '<answer>y</answer>'\n"),
    ],
)
def test_program_is_the_block_that_markdown_shows(reply, program):
    assert code_of_reply(reply) == program


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ('```python\nprint("<think>")\nprint(2)\n```', 'print("<think>")\nprint(2)\n'),
        ('```python\nx = 1\nprint("</think>")\n```', 'x = 1\nprint("</think>")\n'),
        (
            '```python\nprint("<think>a</think>")\nprint(2)\n```',
            'print("<think>a</think>")\nprint(2)\n',
        ),
        (
            '```python\nP = """\n<think>\n</think>\n"""\nprint(P)\n```',
            'P = """\n<think>\n</think>\n"""\nprint(P)\n',
        ),
        (
            '<think>\n```python\nbad()\n```\n</think>\n```python\nprint("<think>")\nprint(2)\n```',
            'print("<think>")\nprint(2)\n',
        ),
        (
            '```python\nbad()\n```\nHmm</think>\n```python\nprint("<think>")\nprint(2)\n```',
            'print("<think>")\nprint(2)\n',
        ),
        ("try ```\n```python\nbad()\n</think>\n\n```python\nprint(2)\n```", "print(2)\n"),
        ("<think>\n```python\nbad()\n```\n", ""),
        ("Sure. <think> ```x\n```python\nbad()\n```\n", "Sure. "),
        (
            '<think>a</think>b<think>```python\nbad()\n```</think>\n```python\nprint("<think>")\nprint(2)\n```',
            'print("<think>")\nprint(2)\n',
        ),
        (
            "<think>use '</think>'\n```python\nbad()\n```\n</think>\n```python\nprint(3)\n```",
            "print(3)\n",
        ),
        ('print("<think>")\nprint(1)', 'print("<think>")\nprint(1)'),
        ("x = '</think>'\nprint(x)", "x = '</think>'\nprint(x)"),
        ("<think>x</think>print(1)", "print(1)"),
        (
            "<think>\n```python\nprint('</think>')\n```\nok</think>\n```python\nfinal()\n```",
            "final()\n",
        ),
        ("```python\ngood()\n```\n<think>\n```python\nbad()\n```", "good()\n"),
        (
            "```python\nimport re\ns = re.sub(r'<think>.*?</think>', '', s)\nprint(s)\n```",
            "import re\ns = re.sub(r'<think>.*?</think>', '', s)\nprint(s)\n",
        ),
        (
            "<think>\r\nx\r\n</think>\r\n```python\r\nprint('<think>')\r\nok()\r\n```",
            "print('<think>')\nok()\n",
        ),
        (
            '<think>a</think><answer>\n```python\nprint("<think>")\nprint(2)\n```\n</answer>',
            'print("<think>")\nprint(2)\n',
        ),
    ],
)
def test_think_tags_in_a_program_are_no_reasoning(reply, program):
    assert code_of_reply(reply) == program


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<think>a</think>\nb", ("a", "b")),
        ("a</think>\n\nb", ("a", "b")),
        ("b <think>a</think>", ("", "b <think>a</think>")),
        ("```\nprint('</think>')\n```", ("", "```\nprint('</think>')\n```")),
        ("<think>a</think>```\ns = '</think>'\n```", ("a", "```\ns = '</think>'\n```")),
    ],
)
def test_reasoning_of_a_message_ends_at_no_tag_of_a_program(content, parts):
    assert split_reasoning({"role": "assistant", "content": content}) == parts


def test_a_reply_of_think_tags_has_no_program():
    assert code_of_reply("</think>\n" * 1000) == "\n"
    assert code_of_reply("<think>\n</think>\n" * 1000 + "x = 1") == "\nx = 1"


@needs_confinement
@pytest.mark.parametrize(
    ("tests", "right", "wrong"),
    [
        (["assert f(1) == 2", "assert f(2) == 3"], 1.0, 0.0),
        ('["assert f(1) == 2", "assert f(2) == 3"]', 1.0, 0.0),
        ("def check(g):\n    assert g(1) == 2\ncheck(f)", 1.0, 0.0),
        ("for x, y in [(1, 2), (2, 3)]:\n    assert f(x) == y", 1.0, 0.0),
        ("if f(1) != 2:\n    raise ValueError", 1.0, 0.0),
        ("import math\nassert math.isclose(f(1), 2)", 1.0, 0.0),
        ("", None, None),
        ("# assert f(1) == 2", None, None),
        ("f(1) == 2", None, None),
        ("print(f(1) == 2)", None, None),
        ("assert (f(1) == 2, 'the sum')", None, None),
        ("def check(g):\n    assert g(1) == 2", None, None),
        ("def test_f():\n    assert f(1) == 2", None, None),
        ("class TestF:\n    def test(self):\n        assert f(1) == 2", None, None),
        ('{"inputs": ["1"], "outputs": ["2"]}', None, None),
        ('[{"input": "1", "output": "2"}]', None, None),
        (">>> f(1)\n2", None, None),
    ],
)
def test_tests_that_no_program_can_fail_give_no_score(helpers, tests, right, wrong):
    reward = build({"kind": "code"})
    talks = [helpers["talk"]("q", f"def f(x): return x + {n}") for n in (1, 3)]
    for talk in talks:
        talk[0]["tests"] = tests
    scores = reward.score(talks)
    assert scores.values == [right, wrong]
    assert bool(scores.counts) == (right is None)


@needs_confinement
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (
            "def f(c): c['a'] += 2",
            "from collections import Counter\nc = Counter('a')\nf(c)\n"
            "assert type(c) is Counter and c == Counter('aaa')",
        ),
        (
            "def f(d):\n    d['b'] = d.pop('a')",
            "from collections import OrderedDict\nd = OrderedDict(a=1, c=2)\nf(d)\n"
            "assert list(d.items()) == [('c', 2), ('b', 1)]",
        ),
        (
            "def f(d): d['a'].append(1)",
            "from collections import defaultdict\nd = defaultdict(list, a=[])\nf(d)\n"
            "assert d['a'] == [1] and d['new'] == []",
        ),
        (
            "def f(d): d.append(3)",
            "from collections import deque\nd = deque([1, 2], maxlen=2)\nf(d)\n"
            "assert d == deque([2, 3]) and d.maxlen == 2",
        ),
        (
            "def f(a): a[1] = 7",
            "import numpy as np\na = np.zeros(3)\nf(a)\nassert a.tolist() == [0, 7, 0]",
        ),
    ],
)
def test_changes_of_mutable_arguments_reach_the_tests(runner, program, tests):
    """The program receives a copy, and the tests see its changes in their own object."""
    assert runner.run(program, tests).status == "passed"
    assert runner.run("def f(x): pass", tests).status == "failed"
