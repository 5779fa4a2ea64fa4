"""A manifest is checked whole, and stands for the runs that it says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from rlhf.algorithms.registry import ALGORITHMS
from rlhf.cli.table import COMMANDS, configure
from rlhf.config.load import set_dotted_key
from rlhf.errors import UserError
from rlhf.studies.bench.manifest import make_bench


def manifest(**keys: Any) -> dict[str, Any]:
    """Two tasks, two methods, two seeds."""
    tree: dict[str, Any] = {
        "output_dir": "out",
        "seeds": [0, 3],
        "curve_points": 2,
        "model": {"scratch": {}},
        "run": {"num_steps": 4, "episodes_per_step": 8, "rollout": {"max_new_tokens": 4}},
        "environments": {
            "echo": {"env": {"id": "text/Echo-v0"}, "demonstrations": {"count": 16}},
            "maze": {
                "env": {"id": "text/TMaze-v0", "kwargs": {"length": 2}},
                "demonstrations": {},
                "run": {"num_steps": 6, "rollout": {"parallel": 7}},
            },
        },
        "algorithms": {
            "ppo": {"run": {"algorithm": {"kl_coef": 0.2}}},
            "small": {"command": "rloo", "run": {"num_steps": 2}},
        },
    }
    for key, value in keys.items():
        set_dotted_key(tree, key, value)
    return tree


def test_keys_of_algorithms_win_over_environments_and_common_keys():
    bench = make_bench(manifest(), COMMANDS)
    trees = {job.key: job.stages[-1] for job in bench.jobs()}
    command, tree = trees["maze/seed3/ppo"]
    config = configure(command, tree)
    assert (command, config.num_steps, config.episodes_per_step, config.seed) == ("ppo", 6, 8, 3)
    assert (config.rollout.parallel, config.rollout.max_new_tokens) == (7, 4)
    assert config.env.kwargs == {"length": 2}
    assert config.algorithm == replace(ALGORITHMS["ppo"].settings, kl_coef=0.2)
    assert config.model.path == "out/runs/maze/seed3/sft/final"
    assert config.evaluation.every == 3
    command, tree = trees["maze/seed0/small"]
    assert (command, configure(command, tree).num_steps) == ("rloo", 2)


def test_every_cell_is_there_once_and_its_start_is_shared():
    jobs = make_bench(manifest(), COMMANDS).jobs()
    keys = [job.key for job in jobs]
    assert len(keys) == len(set(keys)) == 2 + 4 + 8
    assert {job.after for job in jobs if job.after} <= set(keys)
    waiting = [job.key for job in jobs if job.after == "echo/seed3/sft"]
    assert waiting == ["echo/seed3/ppo", "echo/seed3/small"]


def test_no_two_training_seeds_see_the_same_demonstrations():
    bench = make_bench(manifest(seeds=[0, 1, 2]), COMMANDS)
    spans = []
    for seed in (0, 1, 2):
        for _, tree in bench.initial_model_job("maze", seed).stages[:2]:
            spans.append((tree["seed"], tree["seed"] + tree["files"][0]["count"]))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_without_demonstrations_everybody_starts_from_the_model():
    bench = make_bench(
        manifest(
            **{
                "model": {"path": "somewhere"},
                "environments.echo.demonstrations": None,
                "environments.maze.demonstrations": None,
            }
        ),
        COMMANDS,
    )
    assert bench.initial_row_name == bench.baseline == "model"
    start = bench.initial_model_job("echo", 0)
    assert [command for command, _ in start.stages] == ["evaluate"]
    assert bench.run_config_tree("echo", "ppo", 0)["model"]["path"] == "somewhere"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sedes": [0]}, ["'sedes'", "'seeds'"]),
        ({"environments.echo.rum": {}}, ["environments.echo", "'rum'", "'run'"]),
        ({"environments.echo.env.ids": 3}, ["environments.echo", "env.ids", "'id'"]),
        ({"environments.echo.run": {"num_step": 3}}, ["on echo", "'num_step'", "'num_steps'"]),
        ({"environments.echo.sft": {"batchsize": 3}}, ["echo, sft", "'batch_size'"]),
        ({"environments.echo.sft": {"seed": 3}}, ["echo.sft.seed", "`seeds`"]),
        ({"algorithms.ppoo": {}}, ["algorithms.ppoo", "'ppo'"]),
        ({"algorithms.sft": {}}, ["the name 'sft' is reserved"]),
        ({"algorithms.ppo-seed1": {"command": "ppo"}}, ["ppo-seed1", "do not use 'seed'"]),
        ({"algorithms.ppo.run.evaluation": {}}, ["ppo.run.evaluation", "`episodes`"]),
        ({"algorithms.ppo.run.algorithm": {"kl_coeff": 1}}, ["ppo on echo", "'kl_coef'"]),
        ({"algorithms.dapo": {"run": {"algorithm": {"kl_coef": 1}}}}, ["dapo on echo", "effect"]),
        ({"run.episodes_per_step": 6}, ["small on echo", "group_size", "6"]),
        ({"curve_points": 4}, ["num_steps must be a multiple of curve_points", "2 and 4"]),
        ({"environments.echo.demonstrations": None}, ["give demonstrations for echo"]),
        ({"baseline": "pppo"}, ["baseline", "'ppo'"]),
        ({"seeds": [1, 1]}, ["seeds must be different"]),
        ({"tuning": {"seeds": [9, 3]}}, ["seeds: seed 3 was used for tuning"]),
    ],
)
def test_mistakes_are_named_before_anything_runs(keys, words):
    with pytest.raises(UserError) as caught:
        make_bench(manifest(**keys), COMMANDS)
    assert all(word in str(caught.value) for word in words), caught.value
