"""End of worker processes whose parent process has ended."""

from __future__ import annotations

import multiprocessing
import threading

from rlhf.common.foreign import end_process


def end_with_parent() -> None:
    """Let this worker process end when its parent has ended, also while it runs other code."""
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    end_process(1)
