"""Signals that stop a run."""

from __future__ import annotations

import signal

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that stop a run. They are sent by Ctrl-C, a scheduler or a closed terminal."""


class StopSignal(BaseException):
    """Exception for a signal, outside the training loop, that ends the command like Ctrl-C.

    It is no KeyboardInterrupt, because in `rlhf chat` Ctrl-C cancels only a line or a reply.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
