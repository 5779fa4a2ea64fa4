"""Read the environment variables of a launcher of several processes, such as torchrun."""

from __future__ import annotations

import os

from rlhf.errors import UserError

# Smallest value of each variable, which is also its value in a process without a launcher.
_SMALLEST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}


def launcher_number(variable: str) -> int:
    """Return the number in a variable of the launcher: 1 process or rank 0 without a launcher.

    Args:
        variable: ``WORLD_SIZE`` or ``LOCAL_WORLD_SIZE`` (processes of the run, and of this
            machine), ``RANK`` or ``LOCAL_RANK`` (index of this process among them).

    Raises:
        UserError: The value is not a number, or it is too small.
    """
    smallest = _SMALLEST[variable]
    text = os.environ.get(variable, str(smallest))
    if not text.isdecimal() or int(text) < smallest:
        raise UserError(
            f"{variable} is {text!r}: set it to a whole number from {smallest}, or unset it"
        )
    return int(text)
