"""Derive the runs and jobs of a benchmark from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.commands.command import CommandTable
from rlhf.common.ranges import PositiveInt, convert_to_type
from rlhf.config.bench import BenchAlgorithm, BenchConfig, BenchEnvironment
from rlhf.config.load import merge_trees
from rlhf.config.online import OnlineConfig
from rlhf.rollout.seeds import training_seed
from rlhf.studies.jobs import Job

REFERENCE_FOLDER = "reference"
"""Name of the folder of the policies that are not trained."""
DEMONSTRATIONS_FILE = "sft.jsonl"
NUM_HELD_OUT_DEMONSTRATIONS = 64
"""Number of held-out demonstrations for the evaluation loss of supervised fine-tuning."""
FIRST_HELD_OUT_EPISODE = 3_000_000
"""Index of the first start state of held-out demonstrations; a shorter run does not reach it."""


@dataclass(frozen=True)
class Bench:
    """A benchmark: a checked manifest, from which the runs and jobs are derived."""

    config: BenchConfig
    """Content of the manifest."""
    environments: Mapping[str, BenchEnvironment]
    algorithms: Mapping[str, BenchAlgorithm]
    commands: CommandTable
    """Commands that the jobs run."""

    @property
    def root(self) -> Path:
        """The benchmark's directory."""
        return Path(self.config.output_dir)

    @property
    def initial_row_name(self) -> str:
        """Name of the row of initial models.

        It is "sft" if all environments have demonstrations, "model" if none has, and "initial" if
        some have.
        """
        kinds = {task.demonstrations is not None for task in self.environments.values()}
        return {True: "sft", False: "model"}[kinds.pop()] if len(kinds) == 1 else "initial"

    @property
    def baseline(self) -> str:
        """Name of the row with which the other rows are compared."""
        return self.config.baseline or self.initial_row_name

    def reference_policies_of(self, environment: str) -> list[str]:
        """Return the names of the reference policies of an environment."""
        environment_references = self.environments[environment].references
        return list(
            self.config.references if environment_references is None else environment_references
        )

    def untrained_rows_of(self, environment: str) -> list[str]:
        """Return the rows of an environment that are not trained.

        They are its reference policies, and the `policies` of the manifest.
        """
        return [*self.reference_policies_of(environment), *self.config.policies]

    @property
    def untrained_rows(self) -> list[str]:
        """Rows that are not trained, of all environments."""
        rows = (row for name in self.environments for row in self.untrained_rows_of(name))
        return list(dict.fromkeys(rows))

    def command_of(self, algorithm: str) -> str:
        """Return the name of the command that an algorithm of the manifest runs."""
        return self.algorithms[algorithm].command or algorithm

    def run_path(self, *parts: str) -> Path:
        """Return the path of a directory under runs/."""
        return self.root.joinpath("runs", *parts)

    def run_config_tree(self, environment: str, algorithm: str, seed: int) -> dict[str, Any]:
        """Return the configuration of one training run.

        Raises:
            UserError: The number of steps is not a positive integer.
        """
        task, entry = self.environments[environment], self.algorithms[algorithm]
        tree = merge_trees(merge_trees(self.config.run, task.run), entry.run) | self._plugins
        folder = f"seed{seed}"
        steps = convert_to_type(
            PositiveInt, tree.get("num_steps", OnlineConfig.num_steps), "num_steps"
        )
        return {
            **tree,
            "output_dir": str(self.run_path(environment, folder, algorithm)),
            "model": self.initial_model_config_tree(environment, seed),
            "env": _without_unset_keys(task.env),
            "seed": seed,
            "evaluation": {
                "every": max(1, steps // self.config.curve_points),
                "episodes": self.config.episodes,
                "decoding": self.config.decoding,
            },
            "resume": True,
        }

    @property
    def _plugins(self) -> dict[str, Any]:
        """The plug-ins of the manifest, as a part of the configuration of a run."""
        return {"plugins": self.config.plugins} if self.config.plugins else {}

    def initial_model_config_tree(self, environment: str, seed: int) -> dict[str, Any]:
        """Return the configuration of the initial model of training."""
        if self.environments[environment].demonstrations is None:
            return _without_unset_keys(self.config.model)
        return {"path": str(self.run_path(environment, f"seed{seed}", "sft", "final"))}

    def initial_model_job(self, environment: str, seed: int) -> Job:
        """Return the job that creates and evaluates the initial model.

        With demonstrations, the job generates them and trains the model on them. Without
        demonstrations, the job only evaluates the model of the manifest.
        """
        task, folder = self.environments[environment], f"seed{seed}"
        stages: list[tuple[str, dict[str, Any]]] = []
        if task.demonstrations:
            demos = self._demos_config_tree(environment, seed, "demos", task.demonstrations.count)
            # Held-out demonstrations are generated too, because rows cannot be split by prompt if
            # all episodes have the same first observation.
            held_out = self._demos_config_tree(
                environment, seed, "demos-held-out", NUM_HELD_OUT_DEMONSTRATIONS
            )
            stages += [("demos", demos), ("demos", held_out)]
            stages.append(("sft", self._sft_config_tree(environment, seed)))
        policy = {
            "name": self.initial_row_name,
            "model": self.initial_model_config_tree(environment, seed),
        }
        target = self.run_path(environment, folder, "evaluate")
        stages.append(("evaluate", self.evaluate_config_tree(environment, [policy], target)))
        return Job(f"{environment}/{folder}/{self.initial_row_name}", tuple(stages))

    def training_job(self, environment: str, algorithm: str, seed: int) -> Job:
        """Return the job of one training run; the run ends with its evaluation."""
        tree = self.run_config_tree(environment, algorithm, seed)
        folder = f"{environment}/seed{seed}"
        return Job(
            f"{folder}/{algorithm}",
            ((self.command_of(algorithm), tree),),
            f"{folder}/{self.initial_row_name}",
        )

    def untrained_policies_job(self, environment: str) -> Job:
        """Return the job that evaluates the policies that are not trained."""
        policies = [{"name": name} for name in self.reference_policies_of(environment)]
        policies += [{"name": name, **spec} for name, spec in self.config.policies.items()]
        tree = self.evaluate_config_tree(
            environment, policies, self.run_path(environment, REFERENCE_FOLDER)
        )
        return Job(f"{environment}/{REFERENCE_FOLDER}", (("evaluate", tree),))

    def jobs(self) -> list[Job]:
        """Return all jobs; each job follows the job that it depends on."""
        config, names = self.config, list(self.environments)
        jobs = [self.untrained_policies_job(name) for name in names if self.untrained_rows_of(name)]
        jobs += [self.initial_model_job(name, seed) for seed in config.seeds for name in names]
        jobs += [
            self.training_job(name, algorithm, seed)
            for seed in config.seeds
            for name in names
            for algorithm in self.algorithms
        ]
        return jobs

    def evaluate_config_tree(
        self, environment: str, policies: list[dict[str, Any]], target: Path
    ) -> dict[str, Any]:
        """Return the configuration of an evaluation of `policies` on the held-out episodes.

        `target` is the run directory of the evaluation.
        """
        task = self.environments[environment]
        return {
            **self._plugins,
            "output_dir": str(target),
            "policies": policies,
            "env": _without_unset_keys(task.env),
            "rollout": merge_trees(self.config.run, task.run).get("rollout", {}),
            "episodes": self.config.episodes,
            "decoding": self.config.decoding,
            "resume": True,
        }

    def _demos_config_tree(
        self, environment: str, seed: int, name: str, count: int
    ) -> dict[str, Any]:
        """Return the configuration of a run that generates `count` demonstrations.

        `name` is "demos" or "demos-held-out". The start states differ between training seeds, and
        between the demonstrations for training and the held-out ones.
        """
        task = self.environments[environment]
        assert task.demonstrations
        first = 0 if name == "demos" else FIRST_HELD_OUT_EPISODE
        file = {"path": DEMONSTRATIONS_FILE, "kind": "sft", "count": count}
        return {
            **self._plugins,
            "output_dir": str(self.run_path(environment, f"seed{seed}", name)),
            "env": task.env.id,
            "kwargs": task.env.kwargs,
            "files": [file | {"quality": task.demonstrations.quality}],
            "seed": training_seed(seed, first),
            "resume": True,
        }

    def _sft_config_tree(self, environment: str, seed: int) -> dict[str, Any]:
        """Return the configuration of supervised fine-tuning on the demonstrations."""
        folder = self.run_path(environment, f"seed{seed}")
        return {
            **merge_trees(self.config.sft, self.environments[environment].sft),
            **self._plugins,
            "output_dir": str(folder / "sft"),
            "model": _without_unset_keys(self.config.model),
            "data": [{"path": str(folder / "demos" / DEMONSTRATIONS_FILE)}],
            "eval_data": [{"path": str(folder / "demos-held-out" / DEMONSTRATIONS_FILE)}],
            "seed": seed,
            "resume": True,
        }


def _without_unset_keys(config: Any) -> dict[str, Any]:
    """Return a configuration as a dictionary, without keys whose value is None."""
    return {key: value for key, value in asdict(config).items() if value is not None}
