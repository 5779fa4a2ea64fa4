"""Configuration of `rlhf bench`.

    output_dir: runs/bench
    seeds: [0, 1, 2, 3, 4]
    environments: {menu: {env: {id: text/PreferenceBandit-v0}, demonstrations: {}, run: {...}}}
    algorithms: {ppo: {run: {...}}, grpo: {}}

For each environment and training seed, all algorithms start from the same model. The configuration
of a run combines the keys in `run` of the manifest, of the environment and of the algorithm. The
algorithm takes precedence over the environment, and the environment over the manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from rlhf.common.ranges import AtLeastTwo, Finite, Fraction, PositiveInt, Seed
from rlhf.config.base import DirectoryConfig
from rlhf.config.launcher import LauncherConfig
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations for supervised fine-tuning before reinforcement learning."""

    count: PositiveInt = 1000
    """Number of episodes."""
    quality: Fraction = 0.4
    """Fraction of the actions that the expert policy chooses; the other actions are random."""


@dataclass(frozen=True)
class BenchEnvironment:
    """An environment of a benchmark, and configuration keys of the runs in it."""

    env: EnvSpec
    """The environment."""
    demonstrations: Demonstrations | None = None
    """Demonstrations for supervised fine-tuning. By default, there is no supervised fine-tuning,
    and the runs start from `model`."""
    sft: dict[str, Any] = field(default_factory=dict)
    """Configuration keys of `rlhf sft` for this environment."""
    run: dict[str, Any] = field(default_factory=dict)
    """Configuration keys of online runs in this environment, such as num_steps."""
    references: list[Literal["random", "expert"]] | None = None
    """Policies of this environment that are evaluated for reference; the default is `references` of
    the manifest. An environment without an expert has [random] or []."""
    random: Finite | None = None
    """Return that has the normalized score 0; the default is ``random_value`` of the
    environment."""
    optimal: Finite | None = None
    """Return that has the normalized score 1; the default is ``optimal_value`` of the
    environment."""

    def __post_init__(self) -> None:
        if self.env.id is None:
            raise ValueError(
                "env.prompts: scores cannot be normalized, because a prompt dataset has no optimal "
                "return; set env.id"
            )


@dataclass(frozen=True)
class BenchAlgorithm:
    """A method of a benchmark: an algorithm with its configuration keys."""

    command: str | None = None
    """Name of the algorithm in `rlhf algorithms`; the default is the name of this entry."""
    run: dict[str, Any] = field(default_factory=dict)
    """Configuration keys of online runs of this method, such as optimizer.learning_rate."""


@dataclass(frozen=True)
class BenchConfig(DirectoryConfig):
    """Manifest of a benchmark, with a run for each environment, algorithm and training seed."""

    environments: dict[str, Any]
    """Name -> mapping with env, demonstrations, sft, run, references, random, optimal."""
    algorithms: dict[str, Any]
    """Name -> mapping with command, run."""
    model: ModelSpec
    """Initial model of all runs, before training on demonstrations."""
    seeds: list[Seed]
    """Training seeds. A seed determines the demonstrations, the initial weights and the
    episodes."""
    sft: dict[str, Any] = field(default_factory=dict)
    """Configuration keys of `rlhf sft` for all environments."""
    run: dict[str, Any] = field(default_factory=dict)
    """Configuration keys of online runs for all environments and algorithms."""
    references: list[Literal["random", "expert"]] = field(
        default_factory=lambda: ["random", "expert"]
    )
    """Policies of the environment that are evaluated for reference."""
    policies: dict[str, Any] = field(default_factory=dict)
    """Name -> mapping with path or api, as in `rlhf evaluate`: further policies that are not
    trained, such as a function or a model on a server, as rows of the result."""
    episodes: AtLeastTwo = 256
    """Number of held-out episodes of an evaluation, which are the same for all policies."""
    decoding: Literal["greedy", "sampled"] = "sampled"
    """greedy takes the most likely token; sampled uses rollout.temperature."""
    curve_points: PositiveInt = 4
    """Number of evaluations during training. Each is a point of the sample-efficiency curve."""
    baseline: str | None = None
    """Policy with which the other policies are compared; the default is the initial model."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """Description of the tuning, as written by `rlhf tune`; it is copied to the result."""

    def __post_init__(self) -> None:
        for name in ("environments", "algorithms", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: there are no entries; give at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, got {self.seeds}")
        if shared := sorted(set(self.seeds) & set(self.tuning.get("seeds", ()))):
            raise ValueError(
                f"seeds: seed {shared[0]} was used for tuning, so its results favor the tuned "
                "hyperparameters; choose other seeds"
            )


@dataclass(frozen=True)
class BenchCommandConfig(LauncherConfig, BenchConfig):
    """Configuration of `rlhf bench`: a manifest, and options of the command.

    rlhf bench MANIFEST.yaml --resume              run the unfinished jobs, write the result
    rlhf bench MANIFEST.yaml --against bench.json  exit code 1 if a score is significantly worse
    rlhf bench MANIFEST.yaml --array DIR           write the commands for a cluster
    rlhf bench MANIFEST.yaml --only menu/seed0/ppo run one job in this process
    """

    against: str | None = None
    """Path of an earlier bench.json; the exit code is 1 if a score is significantly worse than in
    this file."""
    array: str | None = None
    """Folder to which Slurm scripts and the command of each job are written; no job is run."""
    only: str | None = None
    """Key of a single job to run in this process, such as menu/seed0/ppo."""

    def __post_init__(self) -> None:
        BenchConfig.__post_init__(self)
        LauncherConfig.__post_init__(self)
        if len([name for name in ("against", "array", "only") if getattr(self, name)]) > 1:
            raise ValueError("give at most one of --against, --array and --only")

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, without the options of the command, as plain data."""
        tree = asdict(self)
        return {field.name: tree[field.name] for field in fields(BenchConfig)}
