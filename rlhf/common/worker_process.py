"""Worker processes of multiprocessing: their start without the user's script, and their end."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from rlhf.common.foreign import end_process

_start_lock = threading.Lock()


class _ProcessWithoutUserScript(SpawnProcess):
    """A new Python process that does not import the user's script."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _hide_main_script():
            return SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]


class SpawnContextWithoutUserScript(SpawnContext):
    """The start method "spawn", without an import of the user's script.

    A script without a main guard would otherwise run a second time in every worker process, and
    replace the runs that it made before. Workers find code by the name of its file or module.
    """

    Process = _ProcessWithoutUserScript  # type: ignore[assignment]


@contextlib.contextmanager
def _hide_main_script() -> Iterator[None]:
    """Return a context manager in which multiprocessing does not know the file of the script."""
    with _start_lock:
        main = sys.modules["__main__"]
        stand_in = types.ModuleType("__main__")
        vars(stand_in).update(vars(main))
        stand_in.__spec__ = None
        vars(stand_in).pop("__file__", None)
        sys.modules["__main__"] = stand_in
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def end_with_parent() -> None:
    """Let this worker process end when its parent has ended, also while it runs other code."""
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    end_process(1)
