"""Fixtures for the tests of whole runs."""

import hashlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests run in parallel on small models, for which a second thread is slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Restore the signals that a shell in the background and `nohup` ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--draw TEXT/N`, which runs one sweep test in N, selected by a hash of the text.

    At least one test is selected, because pytest fails if it runs none.
    """
    parser.addoption("--draw", default="", metavar="TEXT/N", help="a part of the sweeps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect sweep tests that are not drawn, and start with the files that contain slow tests.

    A file that takes minutes would otherwise run alone at the end, while other workers are idle.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    text, _, parts = str(config.getoption("--draw")).rpartition("/")
    if not parts:
        return
    sweeps = [item for item in items if item.get_closest_marker("sweep")]
    sweeps.sort(key=lambda item: hashlib.sha256(f"{text} {item.nodeid}".encode()).digest())
    left = sweeps[math.ceil(len(sweeps) / int(parts)) :]
    excluded = set(left)
    drawn = [item for item in items if item not in excluded]
    config.hook.pytest_deselected(items=left)
    items[:] = drawn


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Forget the plug-ins of a test."""
    from tests.helpers.registries import restored_registries

    with restored_registries():
        yield


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and one token for each of four words."""
    from tests.helpers.training import save_model

    return save_model(tmp_path_factory.mktemp("models") / "echo")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed files of a wheel that is built from this checkout."""
    from tests.helpers.wheel import build_and_install_wheel

    return build_and_install_wheel(tmp_path_factory.mktemp("wheel"))
