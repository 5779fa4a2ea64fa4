"""Commands whose standard streams are closed, or are pipes without a reader."""

import logging
import os
import signal
import sys

import pytest

from rlhf.cli.main import main
from tests.faults.process import configuration
from tests.helpers.training import assert_same_run

STREAMS = ("stdin", "stdout", "stderr")
BROKEN_PIPE = 128 + signal.SIGPIPE


def close_all():
    """Close the standard streams, as in ``rlhf ppo <&- >&- 2>&-``."""
    for descriptor, name in enumerate(STREAMS):
        os.close(descriptor)
        setattr(sys, name, None)  # as Python does at its start


def write_to_nobody(*descriptors):
    """Let streams be the pipe of a reader that has ended, as in ``rlhf ppo 2>&1 | true``."""
    receive, send = os.pipe()
    os.close(receive)
    for descriptor in descriptors:
        os.dup2(send, descriptor)
        setattr(sys, STREAMS[descriptor], os.fdopen(descriptor, "w", closefd=False))


def exit_code(arguments, change, *values):
    """Run a command in a forked process after a change of its streams; return its exit code."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            logging.getLogger().handlers.clear()
            change(*values)
            code = main(arguments)
            for descriptor in range(3):
                os.fstat(descriptor)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, echo_model):
    run = tmp_path_factory.mktemp("streams") / "whole"
    assert main(["ppo", "--config", str(configuration(run, echo_model))]) == 0
    return run


@pytest.mark.parametrize(
    ("code", "change", "descriptors"),
    [
        (0, close_all, ()),
        (0, write_to_nobody, (2,)),
        (BROKEN_PIPE, write_to_nobody, (1,)),
        (BROKEN_PIPE, write_to_nobody, (1, 2)),
    ],
)
def test_a_training_without_streams_ends_as_with_them(
    tmp_path, echo_model, whole, code, change, descriptors
):
    run = tmp_path / "run"
    arguments = ["ppo", "--config", str(configuration(run, echo_model))]
    assert exit_code(arguments, change, *descriptors) == code
    assert (run / "finished").exists()
    assert (run / "report.html").exists()
    assert_same_run(whole, run)


def test_other_commands_without_streams_have_their_exit_codes(tmp_path, whole):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for words, code in (
        (["report", str(whole)], 0),
        (["data", "check", str(tmp_path / "rows.jsonl")], 0),
        (["envs", "list"], 0),
        (["ppo", "--nope", "1"], 2),
    ):
        assert exit_code(words, close_all) == code, words
        assert exit_code(words, write_to_nobody, 1, 2) == (code or BROKEN_PIPE), words
