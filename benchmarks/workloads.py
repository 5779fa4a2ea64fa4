"""Define the workloads. Functions are named by strings, so that torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Side:
    """One implementation of a workload.

    Args:
        label: name in tables.
        run: ``module:function``, called as ``run(job, timer, **options)``.
        options: keyword arguments of ``run``.
        allocator: whether to apply the toolkit's allocator settings before torch is imported.
        environment: additional environment variables of the process.
        venv: name of the virtual environment, a key of ``benchmarks.venvs.RECIPES``; empty for the
            current environment.
        optional: whether the side is skipped if its virtual environment cannot be created.
    """

    label: str
    run: str
    options: Mapping[str, Any] = field(default_factory=dict)
    allocator: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    venv: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Workload:
    """A measured task. The first side is the toolkit.

    Args:
        title: name in tables.
        unit: unit of the work that a side reports.
        sides: name -> side.
        prepare: ``module:function`` that writes the inputs, called as ``(job, **options)``.
        check: ``module:function`` that compares loss and gradient of two sides on one batch. It is
            called like ``prepare``.
        measure: ``module:function`` that returns the rows of a table, for workloads without sides.
            It is called like ``prepare``.
        options: keyword arguments of ``prepare``, ``check`` and ``measure``.
        min_speed_ratios: side -> required minimum of the ratio of the toolkit's speed to the side's
            speed.
        floor: required minimum speed of the toolkit, in units of work per second.
        max_memory_ratios: side -> maximum ratio of the toolkit's peak memory to the side's peak
            memory.
    """

    title: str
    unit: str = ""
    sides: Mapping[str, Side] = field(default_factory=dict)
    prepare: str = ""
    check: str = ""
    measure: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    min_speed_ratios: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None
    max_memory_ratios: Mapping[str, float] = field(default_factory=dict)


def _trl_sides(function_path: str, **options: Any) -> dict[str, Side]:
    """Return the two sides of TRL: with its default settings and with tuned settings."""
    return {
        "trl": Side("TRL as it comes", function_path, {"tuned": False, **options}),
        "trl-tuned": Side("TRL tuned", function_path, {"tuned": True, **options}, allocator=True),
    }


def _toolkit_side(function_path: str, **options: Any) -> Side:
    """Return the side of the toolkit."""
    return Side("ours", function_path, options, allocator=True)


def _offline_workload(command: str, title: str, min_speed_ratios: Mapping[str, float]) -> Workload:
    """Return the workload of an offline training command."""
    return Workload(
        title,
        "real tokens",
        {
            "ours": _toolkit_side("benchmarks.rlhf_side:time_offline_training", command=command),
            **_trl_sides("benchmarks.trl.offline:train", command=command),
        },
        prepare="benchmarks.inputs:write_offline_inputs",
        check="benchmarks.agreement:compare_offline_loss",
        options={"command": command},
        min_speed_ratios=min_speed_ratios,
    )


def _decoding_workload(
    title: str,
    *,
    rows: int,
    requests: int,
    min_speed_ratio: float,
    reply_lengths: str = "fixed",
    llama: bool = False,
) -> Workload:
    upper = Side(
        "llama.cpp, 4 bits (upper mark)",
        "benchmarks.decoding:time_llama_cpp",
        venv="llama",
        optional=True,
    )
    return Workload(
        title,
        "new tokens",
        {
            "ours": _toolkit_side("benchmarks.decoding:time_toolkit_sampler", rows=rows),
            "transformers": Side(
                "transformers generate",
                "benchmarks.decoding:time_transformers",
                {"rows": rows},
                allocator=True,
            ),
            **({"llama.cpp": upper} if llama else {}),
        },
        prepare="benchmarks.inputs:write_decoding_inputs",
        options={"requests": requests, "reply_lengths": reply_lengths},
        min_speed_ratios={"transformers": min_speed_ratio},
    )


def _startup_workload(title: str, program: str, prepare: str = "") -> Workload:
    return Workload(
        title,
        "starts",
        {
            "ours": Side("ours", "benchmarks.startup:time_program", {"program": f"rlhf-{program}"}),
            "trl": Side("TRL", "benchmarks.startup:time_program", {"program": f"trl-{program}"}),
        },
        prepare=prepare,
    )


WORKLOADS: dict[str, Workload] = {
    "sft": _offline_workload("sft", "SFT, 8 documents", {"trl-tuned": 2.5, "trl": 5.0}),
    "sft-allocator": Workload(
        "SFT, 8 documents, with and without our allocator settings",
        "real tokens",
        {
            "ours": _toolkit_side("benchmarks.rlhf_side:time_offline_training", command="sft"),
            "system": Side(
                "ours, system's allocator",
                "benchmarks.rlhf_side:time_offline_training",
                {"command": "sft"},
            ),
        },
        prepare="benchmarks.inputs:write_offline_inputs",
        options={"command": "sft"},
    ),
    "reward": _offline_workload("reward", "Reward model, 4 pairs", {"trl-tuned": 2.0}),
    "dpo": _offline_workload("dpo", "DPO, 4 pairs, prompt 128", {"trl-tuned": 2.5}),
    "grpo": Workload(
        "GRPO, K = 8, prompt 64, 32 new",
        "new tokens",
        {
            "ours": _toolkit_side("benchmarks.rlhf_side:time_online_training"),
            **_trl_sides("benchmarks.trl.grpo:train"),
        },
        prepare="benchmarks.inputs:write_grpo_inputs",
        check="benchmarks.agreement:compare_grpo_loss",
        min_speed_ratios={"trl-tuned": 2.5, "trl": 3.5},
    ),
    "ppo": Workload(
        "PPO, 8 episodes, prompt 64, 32 new, 2 epochs of 2 mini-batches",
        "new tokens",
        {
            "ours": _toolkit_side("benchmarks.rlhf_side:time_online_training"),
            "trl": Side("TRL 1.12 as it comes", "benchmarks.trl.ppo:train", venv="trl-ppo"),
            "trl-tuned": Side(
                "TRL 1.12 tuned",
                "benchmarks.trl.ppo:train",
                allocator=True,
                # The trainer ignores its option bf16 and uses only this variable of accelerate.
                environment={"ACCELERATE_MIXED_PRECISION": "bf16"},
                venv="trl-ppo",
            ),
        },
        prepare="benchmarks.inputs:write_ppo_inputs",
        min_speed_ratios={"trl": 3.0, "trl-tuned": 3.0},
        max_memory_ratios={"trl": 0.5, "trl-tuned": 0.5},
    ),
    "tiny": Workload(
        "PPO with an environment, 2.8M parameters, prompt 32, 16 new, 128 rollouts",
        "token-steps",
        {"ours": _toolkit_side("benchmarks.rlhf_side:time_online_training")},
        prepare="benchmarks.inputs:write_tiny_ppo_inputs",
        floor=1800.0,
    ),
    "decoding-1": _decoding_workload(
        "Decoding, 1 row, prompt 64, 64 new", rows=1, requests=1, min_speed_ratio=1.3, llama=True
    ),
    "decoding-32": _decoding_workload(
        "Decoding, 32 rows, prompt 64, 64 new", rows=32, requests=32, min_speed_ratio=1.5
    ),
    "decoding-mixed": _decoding_workload(
        "Decoding, 64 replies of 1 to 90 tokens in 32 rows",
        rows=32,
        requests=64,
        min_speed_ratio=2.0,
        reply_lengths="mixed",
    ),
    "multiturn": Workload(
        "Rollouts of 10 turns, 8 episodes of 440 tokens",
        "episode tokens",
        {
            "ours": _toolkit_side("benchmarks.multiturn:time_toolkit_rollouts"),
            "trl-tuned": Side(
                "TRL tuned", "benchmarks.multiturn:time_trl_rollouts", allocator=True
            ),
        },
        prepare="benchmarks.inputs:write_multiturn_inputs",
        min_speed_ratios={"trl-tuned": 3.0},
    ),
    "slow-env": Workload(
        "Rollouts of 5 turns, 32 episodes, steps of the environment that take 100 ms",
        "episode tokens",
        {
            "ours": _toolkit_side(
                "benchmarks.multiturn:time_toolkit_rollouts", delay=0.1, concurrency="threads"
            ),
            "instant": _toolkit_side("benchmarks.multiturn:time_toolkit_rollouts"),
            "lockstep": _toolkit_side("benchmarks.multiturn:time_toolkit_rollouts", delay=0.1),
        },
        prepare="benchmarks.inputs:write_multiturn_inputs",
        options={"episodes": 32, "turns": 5},
    ),
    "shared-prefix": Workload(
        "Update, K = 8, prompt 512, 32 new",
        "tokens of whole rows",
        {
            "ours": _toolkit_side("benchmarks.prefix:time_policy_update", shared=True),
            "plain": Side(
                "ours, every row whole",
                "benchmarks.prefix:time_policy_update",
                {"shared": False},
                allocator=True,
            ),
        },
        prepare="benchmarks.inputs:write_shared_prefix_inputs",
        check="benchmarks.prefix:compare_gradients",
        min_speed_ratios={"plain": 4.0},
    ),
    "mfu": Workload(
        "Packed SFT step, 2,048 tokens, against the bf16 matmul ceiling",
        "FLOP",
        {
            "ours": _toolkit_side("benchmarks.rlhf_side:time_offline_training", command="sft"),
            "matmul": Side("bf16 products of 2048 x 2048", "benchmarks.peak_flops:time_matmul"),
        },
        prepare="benchmarks.inputs:write_mfu_inputs",
        min_speed_ratios={"matmul": 0.27},
    ),
    "startup-help": _startup_workload("`rlhf --help` and `trl --help`", "help"),
    "startup-import": _startup_workload("`import rlhf` and `import trl`", "import"),
    "startup-first-step": _startup_workload(
        "From the command to the first SFT step, 2.8M parameters",
        "first-step",
        "benchmarks.inputs:write_first_step_inputs",
    ),
    "environments": Workload(
        "Environments",
        measure="benchmarks.environments:measure_environments",
        options={"seconds": 0.3},
    ),
}

WORKLOAD_GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name in WORKLOADS if name.startswith(f"{group}-"))
    for group in ("decoding", "startup")
}
"""Name of a group -> its workloads; "all" contains every workload."""
