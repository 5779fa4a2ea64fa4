"""Two threads whose guards of third-party code overlap leave the process as it was."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rlhf.common.foreign import limit_side_effects

WAIT = 60.0
"""Time limit of a wait that a correct program ends at once, in seconds."""


@contextmanager
def guard_in_a_thread() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Another thread is in the guard until the first event is set; then it sets the second one."""
    inside, leave, left = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        with limit_side_effects():
            inside.set()
            leave.wait(WAIT)
        left.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(WAIT)
    try:
        yield leave, left
    finally:
        leave.set()
        thread.join(WAIT)


@pytest.mark.parametrize("first", ["thread", "main"])
def test_overlapping_guards_restore_standard_output_and_exit(first: str, capsys) -> None:
    stdout, end = sys.stdout, os._exit
    with guard_in_a_thread() as (leave, left):
        with limit_side_effects():
            if first == "thread":  # the thread entered first and leaves first
                leave.set()
                assert left.wait(WAIT)
            print("from third-party code")
            with pytest.raises(SystemExit):
                os._exit(3)
        if first == "main":  # the main thread leaves while the thread is inside
            print("still redirected")
    assert sys.stdout is stdout
    assert os._exit is end
    print("a result")
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert "from third-party code" in err
