"""`rlhf reward-report`: can this reward be trusted? Any reward, on any pairs or benchmark."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.common.files import write_jsonl
from rlhf.config.data import DataSpec
from rlhf.config.model import ModelSpec
from rlhf.config.rollout import EnvSpec, RolloutSpec
from rlhf.data.files import read_rows
from rlhf.data.load import load, logged_rows
from rlhf.data.splits import prompt_key
from rlhf.errors import UserError
from rlhf.runs.directory import Run

log = logging.getLogger(__name__)

Benchmark = Literal["rewardbench", "rewardbench2", "rmbench", "judgebench"]

SCORERS: dict[str, str] = {
    "rewardbench": "reward_bench",
    "rewardbench2": "reward_bench_2",
    "rmbench": "rm_bench",
    "judgebench": "judge_bench",
}
"""Benchmark -> the function of rlhf.reward_models.benchmarks that scores its rows."""


@dataclass(frozen=True)
class RewardReportConfig:
    """A reward, and what it is judged on: pairs, a benchmark, or both."""

    output_dir: str
    """The run directory."""
    reward: str | None = None
    """Folder of a trained reward model."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Rewards by kind, as in a training configuration; their sum is judged."""
    data: list[DataSpec] = field(default_factory=list)
    """Preference pairs that the reward has not seen."""
    train_data: list[DataSpec] = field(default_factory=list)
    """Pairs it was trained on: the bag of words learns from them too, and leaks are counted."""
    benchmark: Benchmark | None = None
    """A public benchmark, in its own format."""
    path: str | None = None
    """The benchmark's file, folder or hub id."""
    split: str = "train"
    """Split of the benchmark's folder or hub id."""
    policy: ModelSpec | None = None
    """The policy to be trained; the spread of scores among its replies is told."""
    gold: list[dict[str, Any]] = field(default_factory=list)
    """With a policy: a score that is known to be right, for the curve of best-of-n."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    """How the policy is sampled."""
    prompts: int = 32
    """Prompts that the policy replies to."""
    samples: int = 8
    """Its replies to each."""
    stress_size: int = 200
    """Conversations in each stress test; 0 leaves these tests out."""
    invariance_size: int = 32
    """Conversations scored alone and in company; 0 leaves this test out."""
    save: bool = False
    """With `reward`: write the fitted temperature and, with a policy, the mean and deviation on its
    replies into the checkpoint's reward_model.json."""
    seed: int = 0
    """Of resampling, sampling and stress tests."""
    resume: bool = False
    """Accept an existing output_dir."""
    overwrite: bool = False
    """Replace an existing output_dir."""

    def __post_init__(self) -> None:
        if (self.reward is None) == (not self.rewards):
            raise ValueError("reward-report: give either --reward FOLDER or --rewards")
        if not self.data and self.benchmark is None:
            raise ValueError(
                "reward-report: nothing to judge it on; give data (pairs) or benchmark"
            )
        if (self.benchmark is None) != (self.path is None):
            raise ValueError("reward-report: benchmark and path (its file or hub id) go together")
        if self.policy is not None and not self.data:
            raise ValueError("policy: it replies to the prompts of the pairs; give data")
        if self.gold and self.policy is None:
            raise ValueError("gold has no effect without a policy whose replies it scores")
        if self.save and self.reward is None:
            raise ValueError("save writes into a checkpoint; it needs --reward FOLDER")
        if self.prompts < 1 or self.samples < 2:
            raise ValueError(
                f"prompts must be >= 1 and samples >= 2, got {self.prompts} and {self.samples}"
            )


def run_reward_report(verb: str, config: RewardReportConfig, run: Run) -> Path:
    """Measure, write summary.json and report.md under evaluation/; returns the run directory.

    The page is drawn when the run ends.
    """
    from rlhf.models.rewards import load_rewards

    reward = load_rewards(
        config.rewards or [{"kind": "learned", "path": config.reward, "name": "reward"}]
    )
    if config.data:
        report = pairs_report(config, reward, run)
        for line in report["verdict"]:
            log.info("%s", line)
        if config.save and config.reward:
            save_calibration(Path(config.reward), report)
    if config.benchmark and config.path:
        rows = read_rows(DataSpec(config.path, split=config.split))
        report_on_benchmark(config.benchmark, reward, rows, run.directory)
    return run.directory


def pairs_report(config: RewardReportConfig, reward: Any, run: Run) -> dict[str, Any]:
    """The whole report on preference pairs, as plain data."""
    from rlhf.evaluation.pairs import report_on_pairs

    loaded = load(config.data, "preference", seed=config.seed)
    log.info("data: %s", loaded.summary())
    train = logged_rows(config.train_data, "preference", what="train_data", seed=config.seed)
    groups = policy_replies(config, loaded.rows, run.directory) if config.policy else None
    curve = best_of_n(config, reward, groups) if config.gold and groups else None
    return report_on_pairs(
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


def policy_replies(
    config: RewardReportConfig, rows: Sequence[Mapping[str, Any]], directory: Path
) -> list[list[Any]]:
    """The policy's replies to the first prompts of the pairs; the prompts are kept as a file."""
    from rlhf.evaluation.replies import sample_replies

    assert config.policy is not None
    kept = list({prompt_key(row): row for row in rows}.values())[: config.prompts]
    prompts = [{key: row[key] for key in ("prompt", "tools") if key in row} for row in kept]
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
    )


def best_of_n(
    config: RewardReportConfig, reward: Any, groups: list[list[Any]]
) -> dict[str, Any] | None:
    """Reward and gold of the reply that the reward chooses among n, with the fit of Gao et al."""
    from rlhf.evaluation.replies import score_replies
    from rlhf.models.rewards import load_rewards
    from rlhf.studies.overoptimize.results import best_of_n_result

    by = score_replies(reward, groups, what=reward.name)
    gold = score_replies(load_rewards(config.gold), groups, what="gold")
    if len(groups) < 3 or config.samples < 8 or by.std() == 0:
        log.info("no curve of best-of-n: it needs 3 prompts, 8 samples, and scores that differ")
        return None
    return best_of_n_result(reward.name, ((by - by.mean()) / by.std())[None], gold)


def save_calibration(folder: Path, report: Mapping[str, Any]) -> None:
    """Keep what was fitted beside the weights; what could not be fitted stays as it was.

    Raises:
        UserError: the folder has no reward_model.json, so it is not ours to change.
    """
    from rlhf.reward_models import Sidecar

    sidecar = Sidecar.read(folder)
    if sidecar is None:
        raise UserError(f"save: {folder} has no reward_model.json to write into")
    result: dict[str, float] = {}
    if (temperature := report["calibration"]["fitted"]["temperature"]) is not None:
        result["temperature"] = temperature
    if (policy := report["policy"]) and policy["std"]:
        result |= {"mean": policy["mean"], "std": policy["std"]}
    dataclasses.replace(sidecar, **result).write(folder)


def report_on_benchmark(
    name: str, reward: Any, rows: Sequence[Mapping[str, Any]], directory: Path
) -> dict[str, Any]:
    """A benchmark's own score and parts, in evaluation/<name>/summary.json.

    Raises:
        UserError: rows that lack the benchmark's columns.
    """
    from rlhf.reward_models import benchmarks
    from rlhf.reward_models.report.markdown import benchmark_page, write_report

    score: Callable[..., dict[str, Any]] = getattr(benchmarks, SCORERS[name])
    try:
        result = score(reward, rows)
    except KeyError as error:
        raise UserError(f"{name}: a row has no column {error}; is this another format?") from error
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
    write_report(directory, summary, benchmark_page(name, reward.name, result))
    log.info("%s: %.3f on %d rows", name, result["score"], len(rows))
    return summary
