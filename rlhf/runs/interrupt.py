"""Graceful interruption: Ctrl-C stops a run after the current step and its checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from rlhf.errors import UserError


class Interrupted(UserError):
    """The user stopped a run; its last completed step is saved."""


class StopRequest:
    """In a ``with`` block, the first Ctrl-C sets ``requested``; the second interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        # Only the main thread may install handlers; elsewhere (notebook kernels) nothing changes.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def check(self, directory: object) -> None:
        """Raise Interrupted if the user pressed Ctrl-C; call it when a checkpoint is written."""
        if self.requested:
            raise Interrupted(f"stopped on request; continue with --resume ({directory})")
