"""A failing write leaves the old content and is reported as an error of the file system."""

import contextlib
import errno
import os
import resource
import signal

import pytest

from rlhf.common.files import (
    append_text,
    atomic_path,
    describe_write_error,
    find_write_error,
    read_log,
    write_text,
)
from rlhf.errors import UserError
from rlhf.runs import claim, directory
from rlhf.runs.directory import Run


@contextlib.contextmanager
def size_limit():
    """Limit the size of files to 100 bytes.

    A fixture would also limit the file to which the test runner may write its output.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_line_that_does_not_fit_is_removed_again(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_text(log, '{"step": 1}\n')
    with size_limit(), pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
        append_text(log, '{"step": 2, "text": "' + "x" * 200 + '"}\n')
    assert caught.value.errno == errno.EFBIG
    assert log.read_text() == '{"step": 1}\n'
    append_text(log, '{"step": 2}\n')
    assert [row["step"] for row in read_log(log)] == [1, 2]


def test_a_file_whose_first_line_does_not_fit_is_not_made(tmp_path):
    with size_limit(), pytest.raises(OSError, match=r"samples\.jsonl"):
        append_text(tmp_path / "samples.jsonl", "x" * 200)
    assert not list(tmp_path.iterdir())


def test_a_replaced_file_keeps_its_content(tmp_path):
    write_text(tmp_path / "a", "old")
    with size_limit(), pytest.raises(OSError, match=r"/a'"):
        write_text(tmp_path / "a", "x" * 200)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_full_disk_does_not_cost_the_run_that_would_be_replaced(tmp_path, monkeypatch):
    tree = {"command": "ppo", "output_dir": str(tmp_path / "run"), "seed": 0}
    finished = Run.open(tree)
    finished.log(1, {"a": 1.0})
    finished.finish()
    finished.close()
    before = contents(tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(claim, "write_text", full)
        with pytest.raises(UserError, match="the disk is full; free space"):
            Run.open(tree | {"overwrite": True})
    assert contents(tmp_path / "run") == before
    replacing = Run.open(tree | {"overwrite": True})
    with monkeypatch.context() as patch:
        patch.setattr(directory, "append_text", full)
        with pytest.raises(OSError, match="No space left"):
            replacing.log(1, {"a": 2.0})
    replacing.close()
    assert contents(tmp_path / "run") == before


def contents(folder):
    """Content of every file except the marker, which names the last writer, by name."""
    files = (path for path in folder.iterdir() if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.name != claim.MARKER}


def test_an_error_of_another_library_is_recognized(tmp_path):
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    named = pytest.raises(OSError, match=r"No space left on device: .*/model'")
    with named as caught, atomic_path(tmp_path / "model"):
        raise Exception(text)
    assert describe_write_error(caught.value) == "the disk is full; free space"


def test_other_errors_are_not_errors_of_the_file_system(tmp_path):
    assert find_write_error(ValueError("a bug")) is None
    assert find_write_error(FileNotFoundError(errno.ENOENT, "missing")) is None
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a"):
        raise ZeroDivisionError
