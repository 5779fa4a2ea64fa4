"""Adapters for third-party environments.

Each adapter needs an optional extra, whose package is imported when the environment is created.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from rlhf.common.names import did_you_mean
from rlhf.errors import UserError


class MissingExtraError(UserError, ImportError):
    """Error for a missing optional dependency; the message contains the install command."""


def import_from_extra(module: str, extra: str) -> ModuleType:
    """Import and return a module of the optional extra `extra`.

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(f'this needs {extra}: pip install "rlhf-kit[{extra}]"') from error


def check_task_is_offered(
    name: str,
    known: Collection[str],
    not_offered: Mapping[str, str],
    message_start: str,
    listing_function_name: str,
) -> None:
    """Raise a UserError if a third-party task is unknown or not offered.

    Args:
        name: Name of the task.
        known: Names of the available tasks.
        not_offered: Task that is not offered -> reason, as a clause that follows "it".
        message_start: Start of the message for an unknown task, such as "textarena has no game".
        listing_function_name: Name of the function that lists the available tasks, for the message.
    """
    if name in not_offered:
        raise UserError(f"{name} is not offered: it {not_offered[name]}")
    if name not in known:
        hint = did_you_mean(name, known) or f"; see {listing_function_name}"
        raise UserError(f"{message_start} {name!r}{hint}")


class PrivateGenerators:
    """Private random streams for code that uses Python's and numpy's global generators.

    Within `with generators.active():`, the global generators continue the private streams. At the
    end of the `with` block, their previous state is restored. Third-party code is therefore
    reproducible in each environment and does not change the random numbers of other code.
    """

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Restart both streams from a seed."""
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return a context manager in which the global generators use the private streams."""
        user_state = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(user_state[0])
            np.random.set_state(user_state[1])
