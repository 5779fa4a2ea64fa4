"""`rlhf overoptimize`: over-optimize proxies of a known gold score and recommend when to stop.

Proxies are reward models trained on few pairs. The policy is optimized against them by best-of-n
and by reinforcement learning; the gold score is only measured. Results are plotted over the square
root of the KL to the initial policy, as in Gao, Schulman & Hilton (2022).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import reward_models
from rlhf.commands.command import CommandTable
from rlhf.common.files import write_jsonl
from rlhf.config.model import ModelSpec
from rlhf.config.overoptimize import OveroptimizeConfig, ProxyGrid, TrainingSpec
from rlhf.config.rollout import EnvSpec
from rlhf.data.load import load_and_log
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.evaluation.replies import sample_replies, score_replies
from rlhf.models.rewards import load_rewards, with_packing
from rlhf.reports.overoptimization import RESULT_FILE
from rlhf.reward_models import Sidecar
from rlhf.runs.directory import Run
from rlhf.runs.launch import release_memory
from rlhf.runs.renamed import read_metrics, read_samples
from rlhf.studies.overoptimize.results import (
    Track,
    best_of_n_result,
    combined_proxy_scores,
    rl_result,
    verdict,
)

log = logging.getLogger(__name__)

HELD_OUT = 0.1  # share of the prompts on which the proxies' accuracy is measured


@dataclass(frozen=True)
class Proxy:
    """Reward models with the same base and number of pairs (an ensemble)."""

    name: str
    parameters: int | None
    """Number of parameters of one member; None for an existing reward."""
    pairs: int | None
    members: list[Path]
    accuracy: float | None
    """Mean accuracy of the members on held-out pairs."""

    def as_dict(self, how: str) -> dict[str, Any]:
        """Return the proxy as plain data, with the way its members are combined."""
        return {
            "how": how,
            "parameters": self.parameters,
            "pairs": self.pairs,
            "members": max(1, len(self.members)),
            "accuracy": self.accuracy,
        }


def run_overoptimize(
    command: str, config: OveroptimizeConfig, run: Run, commands: CommandTable
) -> Path:
    """Train the proxies, optimize against them, fit, and write overoptimization.json.

    Returns:
        The run directory.

    Raises:
        UserError: a part of the configuration is wrong, or some reply has no gold score.
    """
    study = _Study(config, run.directory, commands)
    study.check()
    gold = load_rewards(config.gold)
    proxies = study.train_proxies(config.proxies) if config.proxies else []
    groups = sample_replies(
        config.model,
        study.env,
        config.rollout,
        prompts=config.best_of_n.prompts,
        samples=config.best_of_n.samples,
        seed=config.seed,
    )
    truth = score_replies(gold, groups, what="gold")
    start = float(truth.mean())
    log.info("gold score of the initial policy: %.4f", start)
    results: dict[str, Any] = {
        "gold": gold.name,
        "start": start,
        "algorithm": config.rl.algorithm if config.rl else None,
        "best_of_n": [
            proxy.as_dict(how) | best_of_n_result(proxy.name, by, truth)
            for proxy, columns in _scored(config, proxies, groups)
            for how, by in combined_proxy_scores(columns, penalty=config.penalty).items()
        ],
        # Training uses the scale of the scores that `_scored` wrote into the checkpoints.
        "rl": [
            rl_result(how, study.train_against(how, config.rl, proxies, gold), start=start)
            for how in config.rl.against
        ]
        if config.rl
        else [],
    }
    results["verdict"] = verdict(results)
    for line in results["verdict"]:
        log.info("%s", line)
    text = json.dumps(results, indent=1, allow_nan=False)
    (run.directory / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    return run.directory


def plan(name: str, config: OveroptimizeConfig, commands: CommandTable) -> str:
    """Check the parts of a study, for `--dry-run`."""
    _Study(config, Path(config.output_dir), commands).check()
    return "keys and types are right, those of the proxies and of the training too"


@dataclass(frozen=True)
class _Study:
    """A study, and the reward models and policies that are trained for it."""

    config: OveroptimizeConfig
    directory: Path
    commands: CommandTable

    @property
    def env(self) -> EnvSpec:
        """The environment without its own reward; prompts have none."""
        env = self.config.env
        return env if env.prompts else dataclasses.replace(env, reward=0.0)

    def check(self) -> None:
        """Check the configurations of the reward models and training runs before any work.

        Raises:
            UserError: one of them is wrong.
        """
        if grid := self.config.proxies:
            tree = self._proxy_tree(grid, grid.bases[0], train=self.directory, member=0)
            self.commands.configure("reward", {**tree, "output_dir": self.config.output_dir})
        if spec := self.config.rl:
            tree = self._training_tree(spec, [{"kind": "length"}], seed=0)
            self.commands.configure(spec.algorithm, {**tree, "output_dir": self.config.output_dir})

    def train_proxies(self, grid: ProxyGrid) -> list[Proxy]:
        """Train every proxy of the grid; members share the pairs and differ in their seeds."""
        seed, root = self.config.seed, self.directory / "proxies"
        rows = load_and_log(grid.data, "preference", what="proxies.data", seed=seed)
        rows, held_out = split_by_prompt(rows, fraction=HELD_OUT, seed=seed)
        if len(rows) < max(grid.pairs):
            raise UserError(
                f"proxies.pairs needs {max(grid.pairs)} pairs, but without the held-out prompts "
                f"there are {len(rows)}"
            )
        write_jsonl(self._held_out, held_out)
        proxies = []
        for index, base in enumerate(grid.bases):
            for count in grid.pairs:
                train, name = root / f"pairs-{count}.jsonl", f"base{index}-{count}"
                write_jsonl(train, rows[:count])
                members = [
                    self._run(
                        "reward",
                        root / f"{name}-member{member}",
                        self._proxy_tree(grid, base, train=train, member=member),
                    )
                    for member in range(grid.members)
                ]
                proxies.append(_trained_proxy(name, count, members))
                log.info("proxy %s: accuracy %.3f", name, proxies[-1].accuracy)
        return proxies

    def train_against(
        self, how: str, spec: TrainingSpec, proxies: list[Proxy], gold: Any
    ) -> list[Track]:
        """Train the policy against the first proxy, combined as `how`; one track for each seed."""
        tracks = []
        for seed in range(spec.seeds):
            rewards = _proxy_reward(self.config, how, proxies, seed)
            directory = self.directory / "rl" / f"{how}-seed{seed}"
            self._run(spec.algorithm, directory, self._training_tree(spec, rewards, seed=seed))
            tracks.append(_read_track(directory, gold, spec))
        return tracks

    @property
    def _held_out(self) -> Path:
        """File of the pairs that measure the proxies' accuracy."""
        return self.directory / "proxies" / "held-out.jsonl"

    def _run(self, command: str, directory: Path, tree: dict[str, Any]) -> Path:
        """Run a command in `directory` unless it is finished there; return its result."""
        tree = {**tree, "output_dir": str(directory), "resume": True}
        result = self.commands.run_command(command, tree)
        release_memory()
        return result

    def _proxy_tree(
        self, grid: ProxyGrid, base: ModelSpec, *, train: Path, member: int
    ) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(base),
            "data": [{"path": str(train)}],
            "eval_data": [{"path": str(self._held_out)}],
            **grid.training,
            "seed": self.config.seed + member,
        }

    def _training_tree(
        self, spec: TrainingSpec, rewards: list[dict[str, Any]], *, seed: int
    ) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.config.model),
            "env": dataclasses.asdict(self.env),
            "rollout": dataclasses.asdict(self.config.rollout),
            **spec.training,
            "rewards": rewards,
            "samples_per_step": spec.measured,
            "seed": self.config.seed + seed,
        }


def _trained_proxy(name: str, pairs: int, members: list[Path]) -> Proxy:
    """Return a trained proxy, with its size and the accuracy in its members' reports."""
    accuracies = []
    for folder in members:
        run_directory = folder.parent
        report = run_directory / "evaluation" / run_directory.name / "summary.json"
        accuracies.append(json.loads(report.read_text())["accuracy"]["value"])
    size = reward_models.LearnedReward.load(members[0]).model.num_parameters()
    return Proxy(name, size, pairs, members, float(np.mean(accuracies)))


def _scored(
    config: OveroptimizeConfig, proxies: list[Proxy], groups: list[list[Any]]
) -> list[tuple[Proxy, np.ndarray]]:
    """Return each proxy with its members' standardized scores [members, prompts, samples].

    The statistics go into the checkpoints' sidecars: RL and ensembles use the same scale.
    """
    if not proxies:
        reward = load_rewards(config.rewards)
        column = score_replies(reward, groups, what=reward.name)
        scores = _standardized(column, reward.name)
        return [(Proxy(reward.name, None, None, [], None), scores[None])]
    scored = []
    for proxy in proxies:
        columns = []
        for folder in proxy.members:
            reward = with_packing(reward_models.LearnedReward.load(folder))
            column = score_replies(reward, groups, what=str(folder))
            columns.append(_standardized(column, str(folder)))
            sidecar = Sidecar.read(folder)
            assert sidecar is not None
            mean, std = float(column.mean()), float(column.std())
            dataclasses.replace(sidecar, mean=mean, std=std).write(folder)
        scored.append((proxy, np.stack(columns)))
    return scored


def _standardized(column: np.ndarray, name: str) -> np.ndarray:
    """Return the scores with mean 0 and standard deviation 1; `name` is for the error message."""
    if column.std() == 0:
        raise UserError(
            f"{name} gives every reply the same score, so that nothing can be optimized: train it "
            "longer, or give another proxy"
        )
    return (column - column.mean()) / column.std()


def _proxy_reward(
    config: OveroptimizeConfig, how: str, proxies: list[Proxy], seed: int
) -> list[dict[str, Any]]:
    """Return the configuration of the reward that RL maximizes."""
    if not proxies:
        return config.rewards
    members = [str(path) for path in proxies[0].members]
    if how == "single":
        path = members[seed % len(members)]
        return [{"kind": "learned", "path": path, "normalise": True, "name": "proxy"}]
    ensemble = {"kind": "ensemble", "paths": members, "own_scale": True, "how": how}
    return [{**ensemble, "penalty": config.penalty, "name": "proxy"}]


def _read_track(directory: Path, gold: Any, spec: TrainingSpec) -> Track:
    """Return KL, proxy and gold score of each step of a run; gold is measured on transcripts.

    Raises:
        UserError: the run logged no KL, or a transcript has no gold score.
    """
    metrics = [row for row in read_metrics(directory) if "reward/mean" in row]
    if "policy/kl" not in metrics[0]:
        raise UserError(
            f"rl.algorithm: {spec.algorithm} logs no policy/kl, which is needed for the distance"
        )
    samples = [row for row in read_samples(directory) if row["split"] == "train"]
    scores = score_replies(gold, [[row["messages"] for row in samples]], what="gold")[0]
    by_step: dict[int, list[float]] = {}
    for row, value in zip(samples, scores, strict=True):
        by_step.setdefault(row["step"], []).append(float(value))
    return Track(
        steps=[row["step"] for row in metrics],
        kl=[row["policy/kl"] for row in metrics],
        proxy=[row["reward/mean"] for row in metrics],
        gold=[float(np.mean(by_step[row["step"]])) for row in metrics],
    )
