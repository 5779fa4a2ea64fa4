"""The table of workloads. Names are strings until a process needs them: no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Side:
    """One way of doing a workload.

    Args:
        label: in tables.
        run: ``module:function``, called as ``run(job, pace, **options)``.
        options: its keyword arguments.
        allocator: take the toolkit's allocator settings before torch starts.
        environment: variables of its process.
        venv: an environment of its own (a recipe of ``benchmarks.venvs``).
    """

    label: str
    run: str
    options: Mapping[str, Any] = field(default_factory=dict)
    allocator: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    venv: str = ""


@dataclass(frozen=True)
class Workload:
    """What is measured; the first side is ours.

    Args:
        title: in tables.
        unit: of the work that a side reports.
        sides: by name; all of them step in turn.
        prepare: ``module:function`` that writes the inputs, called as ``(job, **options)``.
        check: compares loss and gradient of two sides on one batch, called likewise.
        measure: in place of sides, a function that returns rows of numbers, called likewise.
        options: of those functions.
        bars: the least ratio of our speed to a side's that we ask of ourselves.
        floor: the least speed of ours, in units of work per second.
        memory_bars: the largest share of a side's peak memory.
    """

    title: str
    unit: str = ""
    sides: Mapping[str, Side] = field(default_factory=dict)
    prepare: str = ""
    check: str = ""
    measure: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None
    memory_bars: Mapping[str, float] = field(default_factory=dict)


def _trl(run: str, **options: Any) -> dict[str, Side]:
    """TRL as it comes, and with the settings that a user would find."""
    return {
        "trl": Side("TRL as it comes", run, {"tuned": False, **options}),
        "trl-tuned": Side("TRL tuned", run, {"tuned": True, **options}, allocator=True),
    }


def _offline(verb: str, title: str, bars: Mapping[str, float]) -> Workload:
    ours = Side("ours", "benchmarks.ours:offline", {"verb": verb}, allocator=True)
    return Workload(
        title,
        "real tokens",
        {"ours": ours, **_trl("benchmarks.trl_offline:train", verb=verb)},
        prepare="benchmarks.inputs:offline",
        check="benchmarks.agreement:offline",
        options={"verb": verb},
        bars=bars,
    )


def _ours(run: str, **options: Any) -> Side:
    return Side("ours", run, options, allocator=True)


WORKLOADS: dict[str, Workload] = {
    "sft": _offline("sft", "SFT, 8 documents", {"trl-tuned": 2.5, "trl": 5.0}),
    "reward": _offline("reward", "Reward model, 4 pairs", {"trl-tuned": 2.0}),
    "dpo": _offline("dpo", "DPO, 4 pairs, prompt 128", {"trl-tuned": 2.5}),
    "grpo": Workload(
        "GRPO, K = 8, prompt 64, 32 new",
        "new tokens",
        {"ours": _ours("benchmarks.ours:online"), **_trl("benchmarks.trl_grpo:train")},
        prepare="benchmarks.inputs:grpo",
        check="benchmarks.agreement:grpo",
        bars={"trl-tuned": 2.5, "trl": 3.5},
    ),
    "ppo": Workload(
        "PPO, 8 episodes, prompt 64, 32 new, 2 epochs of 2 mini-batches",
        "new tokens",
        {
            "ours": _ours("benchmarks.ours:online"),
            "trl": Side("TRL 1.12 as it comes", "benchmarks.trl_ppo:train", venv="trl-ppo"),
            "trl-tuned": Side(
                "TRL 1.12 tuned",
                "benchmarks.trl_ppo:train",
                allocator=True,
                # Its bf16 option does nothing: only accelerate's own variable is read.
                environment={"ACCELERATE_MIXED_PRECISION": "bf16"},
                venv="trl-ppo",
            ),
        },
        prepare="benchmarks.inputs:ppo",
        bars={"trl-tuned": 3.0},
        memory_bars={"trl-tuned": 0.5},
    ),
    "tiny": Workload(
        "PPO with an environment, 2.8M parameters, prompt 32, 16 new, 128 rollouts",
        "token-steps",
        {"ours": _ours("benchmarks.ours:online")},
        prepare="benchmarks.inputs:tiny",
        floor=1800.0,
    ),
    "environments": Workload(
        "Environments, steps per second", measure="benchmarks.environments:measure"
    ),
}

GROUPS: dict[str, tuple[str, ...]] = {}
"""Names that stand for several workloads; "all" stands for every one."""
