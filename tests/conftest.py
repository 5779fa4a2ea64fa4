"""Fixtures for the tests of whole runs."""

import os
import zlib
from pathlib import Path

import pytest

# Tests run side by side on small models, for which a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--draw TEXT/N`: of the sweeps, run about one test in N, chosen by the text."""
    parser.addoption("--draw", default="", metavar="TEXT/N", help="a part of the sweeps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the sweeps' tests that were not drawn."""
    text, _, parts = str(config.getoption("--draw")).rpartition("/")
    if not parts:
        return
    drawn, left = [], []
    for item in items:
        number = zlib.crc32(f"{text} {item.nodeid}".encode())
        out = item.get_closest_marker("sweep") is not None and number % int(parts)
        (left if out else drawn).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = drawn


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and one token for each of four words."""
    from tests.helpers.training import save_model

    return save_model(tmp_path_factory.mktemp("models") / "echo")
