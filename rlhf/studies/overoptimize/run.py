"""`rlhf overoptimize`: over-optimize proxies of a known gold score and recommend when to stop.

The proxies are reward models that were trained on few pairs, or an existing reward. The policy is
optimized against them by best-of-n and by reinforcement learning. The gold score is measured, but
not optimized. Results are plotted over the square root of the KL to the initial policy, as in Gao,
Schulman & Hilton (2022).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import reward_models
from rlhf.commands.command import CommandTable
from rlhf.common.conversation import up_to_last_reply
from rlhf.common.files import write_jsonl, write_text
from rlhf.config.model import ModelSpec
from rlhf.config.online import algorithm_of
from rlhf.config.overoptimize import OveroptimizeConfig, PolicyTrainingSpec, ProxyGrid
from rlhf.config.rollout import EnvSpec
from rlhf.data.load import load_and_log
from rlhf.data.splits import split_by_prompt
from rlhf.errors import UserError
from rlhf.evaluation.records import read_summary_file
from rlhf.evaluation.replies import sample_replies, score_replies
from rlhf.models.loading import find_model_folder
from rlhf.models.rewards import enable_reward_packing, load_rewards
from rlhf.reports.overoptimization import RESULT_FILE
from rlhf.reward_models import Sidecar
from rlhf.runs.checksums import update_checksum
from rlhf.runs.directory import Run
from rlhf.runs.launch import collect_garbage_and_trim_heap
from rlhf.runs.renamed import read_metrics, read_samples
from rlhf.stats import unit_means
from rlhf.studies.overoptimize.results import (
    TrainingTrack,
    best_of_n_result,
    combined_proxy_scores,
    rl_result,
    verdict_sentences,
)

log = logging.getLogger(__name__)

FEWEST_PROMPTS = 3
"""Minimum number of different prompts of the best-of-n curve; the fit needs 3 clusters."""
HELD_OUT_FRACTION = 0.1
"""Approximate fraction of the pairs that is held out to measure the accuracy of the proxies. All
pairs of a prompt are in the same part."""


@dataclass(frozen=True)
class ProxyReward:
    """An existing reward, or an ensemble of reward models with equal base and number of pairs."""

    name: str
    num_parameters: int | None
    """Number of parameters of one member; None for an existing reward."""
    num_pairs: int | None
    """Number of training pairs; None for an existing reward."""
    members: list[Path]
    """Folders of the trained reward models; empty for an existing reward."""
    accuracy: float | None
    """Mean accuracy of the members on held-out pairs; None for an existing reward."""

    def as_dict(self, combination: str) -> dict[str, Any]:
        """Return the proxy for JSON, with the `combination` of its members."""
        return {
            "how": combination,
            "parameters": self.num_parameters,
            "pairs": self.num_pairs,
            "members": max(1, len(self.members)),
            "accuracy": self.accuracy,
        }


def run_overoptimize(
    command: str, config: OveroptimizeConfig, run: Run, commands: CommandTable
) -> Path:
    """Train the proxies, optimize against them, fit the curves and write overoptimization.json.

    Returns:
        The run directory.

    Raises:
        UserError: A key of the configuration is wrong, a model or a reward cannot be loaded, there
            are too few pairs or prompts, or a reply has no score.
    """
    study = _OveroptimizationStudy(config, run.directory, commands)
    study.check_configurations()
    for spec in (config.model, *(config.proxies.bases if config.proxies else ())):
        find_model_folder(spec)
    gold = load_rewards(config.gold)
    proxies = study.train_proxies(config.proxies) if config.proxies else []
    sampled = sample_replies(
        config.model,
        study.env_without_reward,
        config.rollout,
        prompts=config.best_of_n.prompts,
        samples=config.best_of_n.samples,
        seed=config.seed,
    )
    groups, prompts = sampled.groups, sampled.units
    check_number_of_prompts(len(groups), len(set(prompts)))
    truth = score_replies(gold, groups, reward_name="gold")
    start = float(unit_means(truth.mean(axis=1), prompts)[1].mean())
    log.info("gold score of the initial policy: %.4f", start)
    results: dict[str, Any] = {
        "gold": gold.name,
        "start": start,
        "algorithm": config.rl.algorithm if config.rl else None,
        "best_of_n": [
            proxy.as_dict(how) | best_of_n_result(proxy.name, by, truth, prompts)
            for proxy, columns in _score_and_record_standardization(config, proxies, groups)
            for how, by in combined_proxy_scores(columns, penalty=config.penalty).items()
        ],
        # Training uses the scale that `_score_and_record_standardization` wrote into the
        # checkpoints.
        "rl": [
            rl_result(
                how, study.train_policy_against_proxy(how, config.rl, proxies, gold), start=start
            )
            for how in config.rl.against
        ]
        if config.rl
        else [],
    }
    results["verdict"] = verdict_sentences(results)
    for line in results["verdict"]:
        log.info("%s", line)
    text = json.dumps(results, indent=1, allow_nan=False)
    write_text(run.directory / RESULT_FILE, text + "\n")
    return run.directory


def check_number_of_prompts(num_start_states: int, num_prompts: int) -> None:
    """Check that there are enough different prompts for intervals, and log repeated prompts.

    Args:
        num_start_states: Number of start states that were sampled.
        num_prompts: Number of their different prompts.

    Raises:
        UserError: There are fewer different prompts than a fit needs.
    """
    if num_prompts < FEWEST_PROMPTS:
        raise UserError(
            f"best_of_n.prompts: the {num_start_states} start states have only {num_prompts} "
            f"different prompts, but a fit needs {FEWEST_PROMPTS}"
        )
    if num_prompts < num_start_states:
        log.info(
            "best_of_n.prompts: the %d start states have %d different prompts, so n = %d",
            num_start_states,
            num_prompts,
            num_prompts,
        )


def plan(name: str, config: OveroptimizeConfig, commands: CommandTable) -> str:
    """Check the configuration of a study, for `--dry-run`; return the line to print.

    Raises:
        UserError: A key is wrong.
    """
    _OveroptimizationStudy(config, Path(config.output_dir), commands).check_configurations()
    return "keys and types are valid, including those of the proxies and of the training"


@dataclass(frozen=True)
class _OveroptimizationStudy:
    """A study, which trains its reward models and policies in subfolders of `directory`."""

    config: OveroptimizeConfig
    directory: Path
    commands: CommandTable

    @property
    def env_without_reward(self) -> EnvSpec:
        """The environment with its reward multiplied by 0; a prompt set has no reward."""
        env = self.config.env
        return env if env.prompts else dataclasses.replace(env, reward=0.0)

    def check_configurations(self) -> None:
        """Check the configurations of the reward models and of the training runs.

        Raises:
            UserError: A configuration is wrong.
        """
        if grid := self.config.proxies:
            tree = self._proxy_config_tree(grid, grid.bases[0], train=self.directory, member=0)
            self.commands.config_from_tree("reward", {**tree, "output_dir": self.config.output_dir})
        if spec := self.config.rl:
            tree = self._training_config_tree(spec, [{"kind": "length"}], seed=0)
            training = self.commands.config_from_tree(
                spec.algorithm, {**tree, "output_dir": self.config.output_dir}
            )
            if not algorithm_of(spec.algorithm, training).needs_reference:
                raise UserError(
                    f"rl.algorithm: {spec.algorithm} computes no KL to the initial policy, which "
                    "the study needs, because its kl_placement is none; set rl.training.algorithm."
                    "kl_placement (with kl_coef 0, the KL is not penalized)"
                )

    def train_proxies(self, grid: ProxyGrid) -> list[ProxyReward]:
        """Train every proxy of the grid, for each base model and number of pairs.

        The members of a proxy are trained on the same pairs with different seeds.

        Raises:
            UserError: There are fewer pairs than required.
        """
        seed, root = self.config.seed, self.directory / "proxies"
        rows = load_and_log(grid.data, "preference", data_name="proxies.data", seed=seed)
        rows, held_out = split_by_prompt(rows, fraction=HELD_OUT_FRACTION, seed=seed)
        if len(rows) < max(grid.pairs):
            raise UserError(
                f"proxies.pairs needs {max(grid.pairs)} pairs, but only {len(rows)} are left after "
                "prompts are held out"
            )
        write_jsonl(self._held_out_file, held_out)
        proxies = []
        for index, base in enumerate(grid.bases):
            for count in grid.pairs:
                train, name = root / f"pairs-{count}.jsonl", f"base{index}-{count}"
                write_jsonl(train, rows[:count])
                members = [
                    self._run_command(
                        "reward",
                        root / f"{name}-member{member}",
                        self._proxy_config_tree(grid, base, train=train, member=member),
                    )
                    for member in range(grid.members)
                ]
                proxies.append(_read_trained_proxy(name, count, members))
                log.info("proxy %s: accuracy %.3f", name, proxies[-1].accuracy)
        return proxies

    def train_policy_against_proxy(
        self, combination: str, spec: PolicyTrainingSpec, proxies: list[ProxyReward], gold: Any
    ) -> list[TrainingTrack]:
        """Train the policy with every seed; return a track for each seed.

        The reward is the first proxy, whose members are combined by `combination`, or the existing
        reward if `proxies` is empty.
        """
        tracks = []
        for seed in range(spec.seeds):
            rewards = _proxy_reward_config(self.config, combination, proxies, seed)
            directory = self.directory / "rl" / f"{combination}-seed{seed}"
            self._run_command(
                spec.algorithm, directory, self._training_config_tree(spec, rewards, seed=seed)
            )
            tracks.append(_read_track(directory, gold))
        return tracks

    @property
    def _held_out_file(self) -> Path:
        """Path of the file with the held-out pairs, on which the proxies' accuracy is measured."""
        return self.directory / "proxies" / "held-out.jsonl"

    def _run_command(self, command: str, directory: Path, tree: dict[str, Any]) -> Path:
        """Run a command with `directory` as its output, or resume it; return the command's result.

        A finished run is not repeated.
        """
        tree = {**tree, "output_dir": str(directory), "resume": True}
        result = self.commands.run_command(command, tree)
        collect_garbage_and_trim_heap()
        return result

    @property
    def _plugins(self) -> dict[str, Any]:
        """The plug-ins of the study, as a part of the configuration of a run."""
        return {"plugins": self.config.plugins} if self.config.plugins else {}

    def _proxy_config_tree(
        self, grid: ProxyGrid, base: ModelSpec, *, train: Path, member: int
    ) -> dict[str, Any]:
        """Return the configuration of the training of one member on the pairs in `train`."""
        return {
            **self._plugins,
            "model": dataclasses.asdict(base),
            "data": [{"path": str(train)}],
            "eval_data": [{"path": str(self._held_out_file)}],
            **grid.training,
            "seed": self.config.seed + member,
        }

    def _training_config_tree(
        self, spec: PolicyTrainingSpec, rewards: Sequence[Mapping[str, Any]], *, seed: int
    ) -> dict[str, Any]:
        """Return the configuration of the training of the policy with one seed."""
        return {
            **self._plugins,
            "model": dataclasses.asdict(self.config.model),
            "env": dataclasses.asdict(self.env_without_reward),
            "rollout": dataclasses.asdict(self.config.rollout),
            **spec.training,
            "rewards": rewards,
            "samples_per_step": spec.measured,
            "seed": self.config.seed + seed,
        }


def _read_trained_proxy(name: str, num_pairs: int, members: list[Path]) -> ProxyReward:
    """Return a trained proxy, with its size and the mean accuracy from the members' reports."""
    accuracies = []
    for folder in members:
        run_directory = folder.parent
        report = run_directory / "evaluation" / run_directory.name / "summary.json"
        accuracies.append(read_summary_file(report)["accuracy"]["value"])
    size = reward_models.LearnedReward.load(members[0]).model.num_parameters()
    return ProxyReward(name, size, num_pairs, members, float(np.mean(accuracies)))


def _score_and_record_standardization(
    config: OveroptimizeConfig, proxies: list[ProxyReward], groups: list[list[Any]]
) -> list[tuple[ProxyReward, np.ndarray]]:
    """Return each proxy with the standardized scores of its members, [members, prompts, samples].

    The mean and the standard deviation of each member's scores are written to the sidecar of its
    checkpoint, so that RL and ensembles use the same scale. If there are no trained proxies, the
    result contains only the existing reward.
    """
    if not proxies:
        reward = load_rewards(config.rewards)
        column = score_replies(reward, groups, reward_name=reward.name)
        scores = _standardized_column(column, reward.name)
        return [(ProxyReward(reward.name, None, None, [], None), scores[None])]
    scored = []
    for proxy in proxies:
        columns = []
        for folder in proxy.members:
            reward = enable_reward_packing(reward_models.LearnedReward.load(folder))
            column = score_replies(reward, groups, reward_name=str(folder))
            columns.append(_standardized_column(column, str(folder)))
            sidecar = Sidecar.read(folder)
            assert sidecar is not None
            mean, std = float(column.mean()), float(column.std())
            update_checksum(dataclasses.replace(sidecar, mean=mean, std=std).write(folder))
        scored.append((proxy, np.stack(columns)))
    return scored


def _standardized_column(column: np.ndarray, name: str) -> np.ndarray:
    """Return the scores shifted and scaled to mean 0 and standard deviation 1.

    Raises:
        UserError: All scores are equal; the message contains `name`.
    """
    if column.std() == 0:
        raise UserError(
            f"{name} gives every reply the same score, so it cannot be optimized: train it longer, "
            "or use another proxy"
        )
    return (column - column.mean()) / column.std()


def _proxy_reward_config(
    config: OveroptimizeConfig, combination: str, proxies: list[ProxyReward], seed: int
) -> Sequence[Mapping[str, Any]]:
    """Return the configuration of the reward that RL maximizes with training seed `seed`.

    It is an existing reward, a single member of the first proxy, or the ensemble of its members.
    """
    if not proxies:
        return config.rewards
    members = [str(path) for path in proxies[0].members]
    if combination == "single":
        path = members[seed % len(members)]
        return [{"kind": "learned", "path": path, "normalize": True, "name": "proxy"}]
    ensemble = {"kind": "ensemble", "paths": members, "own_scale": True, "how": combination}
    return [{**ensemble, "penalty": config.penalty, "name": "proxy"}]


def _read_track(directory: Path, gold: Any) -> TrainingTrack:
    """Return the KL, proxy and gold scores of each step of a run.

    The gold score is measured on the saved transcripts of the training episodes. A step without an
    update, because all scores of its groups are equal, logs no KL. It has the KL of the step
    before, or 0 before the first update.

    Raises:
        UserError: No step had an update, or a transcript has no gold score.
    """
    metrics = [row for row in read_metrics(directory) if "reward/mean" in row]
    if not any("policy/kl" in row for row in metrics):
        raise UserError(
            f"{directory}: no step had an update, so there is no KL to the initial policy; use "
            "easier or harder prompts, or a larger algorithm.group_size"
        )
    samples = [row for row in read_samples(directory) if row["split"] == "train"]
    conversations = [up_to_last_reply(row["messages"]) for row in samples]
    scores = score_replies(gold, [conversations], reward_name="gold")[0]
    by_step: dict[int, list[float]] = {}
    for row, value in zip(samples, scores, strict=True):
        by_step.setdefault(row["step"], []).append(float(value))
    kl = [0.0]
    for row in metrics:
        kl.append(row.get("policy/kl", kl[-1]))
    return TrainingTrack(
        steps=[row["step"] for row in metrics],
        kl=kl[1:],
        proxy=[row["reward/mean"] for row in metrics],
        gold=[float(np.mean(by_step[row["step"]])) for row in metrics],
    )
