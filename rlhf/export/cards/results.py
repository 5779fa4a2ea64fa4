"""Results of a model for its card: evaluations with intervals, and held-out metrics of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from rlhf.common.files import expand_user
from rlhf.common.numbers import decimal_text, is_number
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.errors import UserError
from rlhf.evaluation.records import Evaluation, RunRecord, read_summary_file
from rlhf.export.public_text import without_paths_and_secrets
from rlhf.reports.results import interval_from_mapping
from rlhf.reports.rewards import is_reward_report
from rlhf.stats import Interval


@dataclass(frozen=True)
class Result:
    """One metric of an evaluation."""

    setting: str
    """Environment or data, and decoding."""
    metric: str
    estimate: Interval


def results_of(evaluations: Sequence[Evaluation]) -> list[Result]:
    """Return every metric of evaluations, in the order of `evaluations`."""
    return [result for evaluation in evaluations for result in _results_of_evaluation(evaluation)]


def read_evaluations(folders: Sequence[str]) -> list[Evaluation]:
    """Read the `summary.json` of additional evaluations.

    Raises:
        UserError: A folder has no `summary.json`, or the file is damaged or has no metrics.
    """
    evaluations = []
    for folder in folders:
        summary = read_summary_file(expand_user(folder) / "summary.json")
        evaluation = Evaluation(Path(folder).name, summary, ())
        if not list(_results_of_evaluation(evaluation)):
            raise UserError(
                f"evaluations: {folder} has no summary.json with metrics: give a folder such as "
                "runs/evaluate/evaluation/NAME"
            )
        evaluations.append(evaluation)
    return evaluations


def _results_of_evaluation(evaluation: Evaluation) -> Iterator[Result]:
    """Yield the metrics of an evaluation: of a policy, a reward on pairs, or a classifier."""
    summary = evaluation.summary
    parts = [str(summary.get("env") or evaluation.name)]
    if decoding := summary.get("decoding"):
        parts.append(f"{decoding} decoding")
    setting = without_paths_and_secrets(", ".join(parts))
    if is_reward_report(evaluation):
        yield from _results_from_metrics(setting, {"accuracy": summary["accuracy"]})
        gains = {
            f"gain in accuracy over {name}": baseline.get("gain")
            for name, baseline in summary["baselines"].items()
        }
        yield from _results_from_metrics(setting, gains)
    metrics = summary.get("metrics")
    yield from _results_from_metrics(setting, metrics if isinstance(metrics, Mapping) else {})
    for baseline, gain in (summary.get("gains") or {}).items():
        named = {f"{name}, gain over {baseline}": value for name, value in gain.items()}
        yield from _results_from_metrics(setting, named)


def _results_from_metrics(setting: str, metrics: Mapping[str, Any]) -> Iterator[Result]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            estimate = interval_from_mapping(value)
        elif is_number(value):
            estimate = Interval.without_bounds(value, 0, "the run recorded only the value")
        else:
            continue
        if is_number(estimate.value):
            yield Result(setting, without_paths_and_secrets(name), estimate)


def results_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, with intervals."""
    rows = [
        [
            result.setting,
            result.metric,
            decimal_text(result.estimate.value),
            _interval_text(result.estimate),
            f"{result.estimate.units:,}" if result.estimate.units else "not recorded",
        ]
        for result in results
    ]
    columns = ["evaluation", "metric", "mean", "95% interval", "independent units"]
    return markdown_table(columns, rows)


def _interval_text(estimate: Interval) -> str:
    if estimate.known:
        return f"[{decimal_text(estimate.low)}, {decimal_text(estimate.high)}]"
    return f"none: {estimate.needs}" if estimate.needs else "none"


def hub_eval_results(results: Sequence[Result], task: str) -> list[EvalResult]:
    """Return the results as metadata of a model card.

    The interval is in the arguments of the metric, because the format has no field for it.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=result.setting,
            dataset_name=result.setting,
            metric_type=result.metric,
            metric_value=result.estimate.value,
            metric_name=result.metric,
            metric_args={
                "interval_95": [result.estimate.low, result.estimate.high],
                "independent_units": result.estimate.units,
            }
            if result.estimate.known
            else None,
        )
        for result in results
    ]


def held_out_table(record: RunRecord) -> str:
    """Return a Markdown table of the held-out metrics logged in training; "" if there are none."""
    rows = []
    names = dict.fromkeys(key for row in record.metrics for key in row if key.startswith("eval/"))
    for name in names:
        steps, values = record.series(name)
        if values:
            first, last = (f"{decimal_text(values[i])} (step {steps[i]:.0f})" for i in (0, -1))
            rows.append([name, first, last])
    return markdown_table(["metric", "first", "last"], rows) if rows else ""


def evaluation_notes(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the notes and verdicts that evaluations recorded, as Markdown."""
    notes = []
    for evaluation in evaluations:
        summary = evaluation.summary
        lines = [*(summary.get("verdict") or ()), *(summary.get("notes") or ())]
        notes += [escape_markdown(without_paths_and_secrets(str(line))) for line in lines]
    return notes
