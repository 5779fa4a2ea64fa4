"""Benchmark of the text environments, and of the overhead of a vector environment.

The column "raw" is the number of steps per second of processor time on one core. The time includes
resets without a seed. A reset with a seed would create a random generator, which takes longer than
a step. The column "made" is the same number for environments from `gymnasium.make`. The column
"vector" is the additional time of a vector environment with eight rows, per row and step.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym

from benchmarks.worker import Job
from rlhf import envs

VECTOR_ROWS = 8


def measure_environments(job: Job, *, seconds: float) -> list[dict[str, Any]]:
    """Return a table row for each environment.

    Each number is measured for ``seconds`` seconds of processor time.
    """
    rows = []
    for name in envs.TASKS:
        env_id = f"text/{name}"
        base: Any = gym.make(env_id).unwrapped
        base.reset(seed=0)
        action = base.legal_actions()[0]
        made = steps_per_processor_second(gym.make(env_id), action, seconds)
        overhead = vector_seconds_per_row(env_id, action, seconds) - 1 / made
        rows.append(
            {
                "environment": env_id,
                "raw steps/s": round(steps_per_processor_second(base, action, seconds)),
                "made steps/s": round(made),
                "vector overhead, µs per row": round(1e6 * overhead, 1),
            }
        )
    return rows


def steps_per_processor_second(env: gym.Env, action: str, seconds: float) -> float:
    """Return the number of steps per second of processor time, with resets after episodes."""
    env.reset(seed=0)
    steps, start = 0, time.process_time()
    while True:
        for _ in range(200):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        steps += 200
        elapsed = time.process_time() - start
        if elapsed > seconds:
            return steps / elapsed


def vector_seconds_per_row(env_id: str, action: str, seconds: float) -> float:
    """Return the processor time of a vector environment in seconds, per row and step.

    The environment has eight rows. Rows whose episodes end at the same step are reset together.
    """
    many = gym.make_vec(env_id, num_envs=VECTOR_ROWS)
    many.reset(seed=0)
    steps, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        _, _, terminated, truncated, _ = many.step([action] * VECTOR_ROWS)
        finished = terminated | truncated
        if finished.any():
            many.reset(options={"reset_mask": finished})
        steps += VECTOR_ROWS
    return (time.process_time() - start) / steps
