"""`rlhf reward-report`: evaluate any reward on preference pairs or on a public benchmark."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.common.files import write_jsonl
from rlhf.common.ranges import AtLeastTwo, NonNegativeInt, PositiveInt
from rlhf.common.reward_spec import RewardSpec
from rlhf.config.base import RunConfig
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.files import read_rows
from rlhf.data.load import load, load_and_log
from rlhf.data.splits import prompt_key
from rlhf.errors import UserError
from rlhf.runs.checksums import update_checksum
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)

Benchmark = Literal["rewardbench", "rewardbench2", "rmbench", "judgebench"]

BENCHMARK_SCORERS: dict[str, str] = {
    "rewardbench": "reward_bench",
    "rewardbench2": "reward_bench_2",
    "rmbench": "rm_bench",
    "judgebench": "judge_bench",
}
"""Benchmark -> name of the function in rlhf.reward_models.benchmarks that scores its rows."""


@dataclass(frozen=True)
class RewardReportConfig(RunConfig):
    """Configuration of `rlhf reward-report`: a reward, and pairs, a benchmark, or both."""

    reward: str | None = None
    """Folder of a trained reward model."""
    rewards: list[RewardSpec] = field(default_factory=list)
    """Rewards by kind, as in a training configuration; their sum is evaluated."""
    data: list[DataSpec] = field(default_factory=list)
    """Held-out preference pairs."""
    train_data: list[DataSpec] = field(default_factory=list)
    """Training pairs of the reward, used to fit the bag-of-words baseline and to count common
    prompts."""
    benchmark: Benchmark | None = None
    """A public benchmark; its file must have the format in which the benchmark was published."""
    path: str | None = None
    """File, folder or Hugging Face Hub id of the benchmark."""
    split: str = "train"
    """Split of the benchmark's folder or hub id."""
    policy: ModelSpec | None = None
    """Policy that will be trained with the reward. The report then contains the mean and the
    standard deviation of the scores of its samples."""
    gold: list[RewardSpec] = field(default_factory=list)
    """Rewards whose sum is the gold score of the best-of-n curve; they require a policy."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """Sampling settings of the policy."""
    prompts: PositiveInt = 32
    """Maximum number of different prompts of the pairs for which the policy is sampled."""
    samples: AtLeastTwo = 8
    """Number of samples for each prompt."""
    stress_size: NonNegativeInt = 200
    """Maximum number of conversations in each stress test; 0 skips these tests."""
    invariance_size: NonNegativeInt = 32
    """Maximum number of conversations that are scored alone and in batches; 0 skips this test."""
    save: bool = False
    """Write the fitted temperature (and with a policy, the mean and standard deviation on its
    samples) into the checkpoint's reward_model.json; requires `reward`."""

    def __post_init__(self) -> None:
        if (self.reward is None) == (not self.rewards):
            raise ValueError("reward-report: give either --reward FOLDER or --rewards, not both")
        if not self.data and self.benchmark is None:
            raise ValueError(
                "reward-report: there is nothing to evaluate the reward on; give data (pairs) or "
                "benchmark"
            )
        if (self.benchmark is None) != (self.path is None):
            raise ValueError(
                "reward-report: give both benchmark and path (its file or hub id), or neither"
            )
        if self.policy is not None and not self.data:
            raise ValueError("policy needs the prompts of preference pairs; give data")
        if self.gold and self.policy is None:
            raise ValueError("gold has no effect without a policy whose replies it scores")
        if self.save and self.reward is None:
            raise ValueError(
                "save writes into the checkpoint of a reward model; give --reward FOLDER"
            )
        if self.save and not self.data:
            raise ValueError("save writes the temperature that is fitted on pairs; give data")


def run_reward_report(command: str, config: RewardReportConfig, run: Run) -> Path:
    """Evaluate the reward, and write summary.json and report.md to folders of evaluation/.

    Returns:
        The run directory.
    """
    from rlhf.models.rewards import load_rewards

    reward = load_rewards(
        config.rewards or [{"kind": "trained", "path": config.reward, "name": "reward"}]
    )
    if config.data:
        report = write_pairs_report(config, reward, run)
        for line in report["verdict"]:
            log.info("%s", line)
        if config.save and config.reward:
            write_calibration_to_checkpoint(Path(config.reward), report)
    if config.benchmark and config.path:
        rows = read_rows(DataSpec(config.path, split=config.split))
        write_benchmark_report(config.benchmark, reward, rows, run.directory)
    return run.directory


def write_pairs_report(config: RewardReportConfig, reward: Any, run: Run) -> dict[str, Any]:
    """Write the report on preference pairs to evaluation/pairs/ and return it as plain data."""
    from rlhf.evaluation.pairs import write_pair_evaluation

    loaded = load(config.data, "preference", seed=config.seed, with_answer_and_tests=True)
    loaded.log_summary("data")
    train = load_and_log(config.train_data, "preference", data_name="train_data", seed=config.seed)
    groups = sample_policy_replies(config, loaded.rows, run.directory) if config.policy else None
    curve = best_of_n_curve(config, reward, groups) if config.gold and groups else None
    return write_pair_evaluation(
        reward,
        loaded.rows,
        run.directory,
        name="pairs",
        train_rows=train,
        samples=groups,
        best_of_n=curve,
        dropped=loaded.dropped,
        stress_size=config.stress_size,
        invariance_size=config.invariance_size,
        seed=config.seed,
    )


def sample_policy_replies(
    config: RewardReportConfig, rows: Sequence[Mapping[str, Any]], directory: Path
) -> list[list[Any]]:
    """Sample replies of the policy to the first prompts of the pairs.

    The prompts are written to `prompts.jsonl` in `directory`.

    Returns:
        The conversations of each prompt.
    """
    from rlhf.evaluation.replies import sample_replies

    assert config.policy is not None
    prompt_rows = list({prompt_key(row): row for row in rows}.values())[: config.prompts]
    prompts = [{key: row[key] for key in ("prompt", "tools") if key in row} for row in prompt_rows]
    path = directory / "prompts.jsonl"
    write_jsonl(path, prompts)
    env = EnvSpec(prompts=[DataSpec(str(path))])
    return sample_replies(
        config.policy,
        env,
        config.rollout,
        prompts=len(prompts),
        samples=config.samples,
        seed=config.seed,
    ).groups


def best_of_n_curve(
    config: RewardReportConfig, reward: Any, groups: list[list[Any]]
) -> dict[str, Any] | None:
    """Return the reward and gold scores of best-of-n, with the fit of Gao et al. (2022).

    The result is that of `best_of_n_result`. It is None if there are too few prompts or samples
    for a fit, or all samples have the same reward.
    """
    from rlhf.evaluation.replies import score_replies
    from rlhf.models.rewards import load_rewards
    from rlhf.studies.overoptimize.results import best_of_n_result

    by = score_replies(reward, groups, reward_name=reward.name)
    gold = score_replies(load_rewards(config.gold), groups, reward_name="gold")
    if len(groups) < 3 or config.samples < 8 or by.std() == 0:
        log.info(
            "skipping the best-of-n curve: it needs at least 3 prompts, at least 8 samples, and "
            "different scores"
        )
        return None
    return best_of_n_result(reward.name, ((by - by.mean()) / by.std())[None], gold)


def write_calibration_to_checkpoint(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the fitted temperature, mean and standard deviation into the checkpoint's sidecar.

    Values that the report does not contain are not changed.

    Raises:
        UserError: The folder has no reward_model.json.
    """
    from rlhf.reward_models import Sidecar

    sidecar = Sidecar.read(folder)
    if sidecar is None:
        raise UserError(
            f"save: {folder} has no reward_model.json, so it is not a trained reward model"
        )
    result: dict[str, float] = {}
    if (temperature := report["calibration"]["fitted"]["temperature"]) is not None:
        result["temperature"] = temperature
    if (policy := report["policy"]) and policy["std"]:
        result |= {"mean": policy["mean"], "std": policy["std"]}
    update_checksum(dataclasses.replace(sidecar, **result).write(folder))


def write_benchmark_report(
    name: str, reward: Any, rows: Sequence[Mapping[str, Any]], directory: Path
) -> dict[str, Any]:
    """Evaluate the reward on a benchmark, write evaluation/<name>/ and return its summary.

    Raises:
        UserError: A row does not have a column of the benchmark.
    """
    from rlhf.reward_models import benchmarks
    from rlhf.reward_models.report.markdown import (
        benchmark_result_markdown,
        write_evaluation_report,
    )

    score: Callable[..., dict[str, Any]] = getattr(benchmarks, BENCHMARK_SCORERS[name])
    try:
        result = score(reward, rows)
    except KeyError as error:
        raise UserError(
            f"{name}: a row has no column {error}; the file does not have the benchmark's format"
        ) from error
    summary = {
        "name": name,
        "env": name,
        "policy": reward.name,
        "metrics": {},
        "reward": reward.name,
        "rows": len(rows),
        "benchmark": result,
    }
    if result.get("absent"):
        log.warning("%s: the file has no rows of %s", name, ", ".join(result["absent"]))
    write_evaluation_report(
        directory, summary, benchmark_result_markdown(name, reward.name, result)
    )
    log.info("%s: %.3f on %d rows", name, result["score"], len(rows))
    return summary
