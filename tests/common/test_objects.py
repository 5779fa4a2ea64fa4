"""Fingerprints of objects of a Python program, which decide whether a run may be resumed."""

import functools

import gymnasium as gym
import pytest

from rlhf.api.inputs import to_env_config
from rlhf.common.objects import object_fingerprint, reference_to


def fingerprint_of(value):
    """The fingerprint of a value that a configuration names, which must have one."""
    digest = object_fingerprint(reference_to(value, "key"))
    assert digest is not None
    return digest


def constant(value, function=len):
    def score(conversations):
        return [value + function(talk) for talk in conversations]

    return score


def counting(start):
    calls = start

    def score(conversations):
        nonlocal calls
        calls += 1
        return [0.0 for _ in conversations]

    return score


def double(talk):
    return 2 * len(talk)


def treble(talk):
    return 3 * len(talk)


class Env(gym.Env):
    def __init__(self, pay=1.0):
        self.pay = pay


class OtherEnv(gym.Env):
    pass


def scaled(conversations, *, scale):
    return [scale * len(talk) for talk in conversations]


class Scorer:
    def __init__(self, weight):
        self.weight = weight

    def score(self, conversations):
        return [self.weight for _ in conversations]

    def other(self, conversations):
        return [self.weight + 1 for _ in conversations]


@pytest.mark.parametrize(
    ("make", "same", "changed"),
    [
        (constant, [(1.0,), (1.0,)], (2.0,)),
        (constant, [("a",), ("a",)], ("b",)),
        (constant, [((1, 2),), ((1, 2),)], ((1, 3),)),
        (constant, [(1.0, double), (1.0, double)], (1.0, treble)),
        (lambda k: lambda cs, k=k: [k for _ in cs], [(1,), (1,)], (2,)),
        (lambda k: functools.partial(scaled, scale=k), [(1,), (1,)], (2,)),
        (lambda name: getattr(Scorer(1.0), name), [("score",), ("score",)], ("other",)),
        (lambda env: env, [(Env(),), (Env(),)], (OtherEnv(),)),
    ],
)
def test_a_fingerprint_depends_on_source_and_captured_constants(make, same, changed):
    def digest(arguments):
        value = make(*arguments)
        if isinstance(value, gym.Env):
            return object_fingerprint(to_env_config(value)["id"])
        return fingerprint_of(value)

    first, second = map(digest, same)
    assert first == second
    assert digest(changed) != first


def test_the_attributes_of_an_environment_below_its_wrappers_count():
    environments = [gym.wrappers.OrderEnforcing(Env(pay)) for pay in (1.0, 1.0, 2.0)]
    digests = [object_fingerprint(to_env_config(env)["id"]) for env in [*environments, Env(1.0)]]
    assert digests[0] is not None
    assert digests[0] == digests[1]
    assert digests[0] not in digests[2:]


def test_what_changes_while_a_run_uses_it_does_not_count():
    score = counting(0)
    before = fingerprint_of(score)
    score([[]])
    assert fingerprint_of(score) == before
    assert fingerprint_of(constant([1])) == fingerprint_of(constant([2]))
