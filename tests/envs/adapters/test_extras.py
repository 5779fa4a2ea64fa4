"""Helpers of the adapters, and the error for a missing extra."""

import random

import numpy as np
import pytest

from rlhf.envs.adapters import PrivateGenerators, import_from_extra


def test_missing_extra_names_the_install_command():
    with pytest.raises(ImportError, match=r'this needs tulips: pip install "rlhf-kit\[tulips\]"'):
        import_from_extra("no_such_package_of_tulips", "tulips")


def test_private_generators_restore_the_global_state():
    random.seed(5)
    np.random.seed(5)
    outside = random.getstate(), repr(np.random.get_state())
    generators, drawn = PrivateGenerators(), []
    for _ in range(2):
        generators.seed(7)
        run = []
        for _ in range(2):
            with generators.active():
                run.append((random.random(), np.random.random()))
            assert (random.getstate(), repr(np.random.get_state())) == outside
        drawn.append(run)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_private_generators_restore_the_global_state_after_an_error():
    before = random.getstate()

    def fail() -> None:
        with PrivateGenerators().active():
            raise KeyError(random.random())

    with pytest.raises(KeyError):
        fail()
    assert random.getstate() == before
