"""Build sections of a report: header, warnings, curves and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlhf.common.numbers import is_number
from rlhf.common.text import count_text
from rlhf.evaluation.records import RunRecord
from rlhf.reports.charts import Chart, charts_html
from rlhf.reports.curves import (
    is_online,
    learning_charts_and_constants,
    metric_charts_and_constants,
    metric_keys_without_panel,
    reward_charts,
)
from rlhf.reports.markup import (
    breakable_html,
    capital_acronyms_html,
    capitalize_acronyms,
    duration_text,
    esc,
)
from rlhf.runs.alarms import false_alarm_text
from rlhf.runs.changes import change_text
from rlhf.runs.diagnostics import alarm_name, metric_warnings

_MAX_OTHER_METRICS = 60
"""Maximum number of metrics without a panel that are drawn; a plug-in may log any number."""


def header_html(title: str, runs: Sequence[RunRecord]) -> str:
    """Return the page header as HTML: title, a line of facts, and the stages in order."""
    facts = [count_text(len(runs), "stage")] if len(runs) > 1 else []
    seconds = sum(run.training_seconds for run in runs)
    facts += [duration_text(seconds) + " of training"] if seconds else []
    date = next((str(run.environment["date"]) for run in runs if "date" in run.environment), "")
    facts += [date[:16].replace("T", " ")] if date else []
    versions = next((run.environment["versions"] for run in runs if run.environment), {}) or {}
    facts += [f"{name} {versions[name]}" for name in ("rlhf-kit", "torch") if versions.get(name)]
    processor = next((run.environment.get("processor") for run in runs), None)
    facts += [str(processor)] if processor else []
    chain = "".join(
        f"<li><b>{capital_acronyms_html(run.name)}</b>"
        + "".join(f"<span>{breakable_html(line)}</span>" for line in _stage_summary_lines(run))
        + "</li>"
        for run in runs
    )
    return (
        f"<header><h1>{capital_acronyms_html(title)}</h1>"
        f'<p class="lede">{esc(" · ".join(facts))}</p>'
        f'<ol class="chain">{chain}</ol></header>'
    )


def run_warnings(run: RunRecord, *, with_false_alarm_rates: bool = True) -> list[str]:
    """Return the warnings about one run; those about metrics come first, most serious first.

    Args:
        run: The run.
        with_false_alarm_rates: Whether a warning states how often healthy runs have it. These
            numbers are not in the files of the run.
    """
    warnings = []
    if run.metrics:  # a training run, for whose configuration the metrics are defined
        warnings = [
            f"{sentence} ({false_alarm_text(alarm_name(kind))})"
            if with_false_alarm_rates
            else sentence
            for kind, sentence in metric_warnings(run, "at the end of training")
        ]
    elif run.finished and {"num_steps", "trainer"} & run.config.keys():
        warnings.append(
            "metrics.jsonl is missing or empty, so there are no learning curves and no warnings "
            "about the training."
        )
    episodes = [row for evaluation in run.evaluations for row in evaluation.episodes]
    if missing := sum(row.get("return") is None for row in episodes):
        warnings.append(f"{missing} of {len(episodes)} evaluation episodes have no return.")
    for evaluation in run.evaluations:
        policy = evaluation.summary_field("policy") if len(run.evaluations) > 1 else "evaluation"
        warnings += [f"{policy}: {note}." for note in evaluation.summary.get("notes") or ()]
    if run.metrics and not run.finished and not (run.directory / "final").exists():
        warnings.append(f"Not finished: the last logged step is {run.metrics[-1].get('step')}.")
    return [f"{capitalize_acronyms(run.name)}: {sentence}" for sentence in warnings]


def warning_box_html(runs: Sequence[RunRecord]) -> str:
    """Return the HTML box with all warnings, or an empty string if there are none."""
    messages = [message for run in runs for message in run_warnings(run)]
    if not messages:
        return ""
    items = "".join(f"<li>{esc(message)}</li>" for message in messages)
    return f'<aside class="warnings"><b>Warnings</b><ul>{items}</ul></aside>'


def reward_curves_html(runs: Sequence[RunRecord]) -> str:
    """Return the curves of proxy reward, gold reward and KL for every online stage, as HTML."""
    return "".join(
        f"<h3>{capital_acronyms_html(run.name)}</h3>{charts_html(reward_charts(run))}"
        for run in filter(is_online, runs)
    )


def learning_curves_html(runs: Sequence[RunRecord]) -> str:
    """Return the other curves of every stage as HTML.

    A folded part shows the metrics for which `rlhf.reports.curves` has no panel.
    """
    parts = []
    for run in runs:
        body = _charts_and_constants_html(*learning_charts_and_constants(run))
        body += _other_metrics_html(run)
        if body:
            parts.append(f"<h3>{capital_acronyms_html(run.name)}</h3>{body}")
    return "".join(parts)


def _other_metrics_html(run: RunRecord) -> str:
    keys = metric_keys_without_panel(run)
    shown = keys[:_MAX_OTHER_METRICS]
    body = _charts_and_constants_html(*metric_charts_and_constants(run, shown))
    if not body:
        return ""
    limit = f"the first {len(shown)} of " if len(keys) > len(shown) else ""
    summary = f"Other metrics: {limit}{len(keys)}"
    return f"<details><summary>{summary}</summary>{body}</details>"


def _charts_and_constants_html(charts: Sequence[Chart], constant: Sequence[str]) -> str:
    note = f'<p class="note">Constant: {esc("; ".join(constant))}.</p>' if constant else ""
    return (charts_html(charts) if charts else "") + note


def run_details_html(runs: Sequence[RunRecord]) -> str:
    """Return facts (such as command and versions) and the configuration of every stage, as HTML."""
    parts = []
    for run in runs:
        facts = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in _run_facts(run))
        config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        fold = f"<details><summary>Configuration</summary><pre>{esc(config)}</pre></details>"
        parts.append(
            f"<h3>{capital_acronyms_html(run.name)}</h3>"
            + (f'<dl class="facts">{facts}</dl>' if facts else "")
            + (fold if run.config else '<p class="note">No config.yaml yet.</p>')
        )
    return "".join(parts)


def _stage_summary_lines(run: RunRecord) -> list[str]:
    """Return the lines of a stage: origin of its model, its data, and its steps and time.

    An example is ["from SFT", "PreferenceBandit-v0", "120 steps · 45 s"].
    """
    steps = max((row["step"] for row in run.metrics if is_number(row.get("step"))), default=0)
    effort = [count_text(int(steps), "step")] if steps else []
    effort += [duration_text(run.training_seconds)] if run.training_seconds >= 1 else []
    lines = [_model_origin_text(run.config), _env_or_dataset_text(run.config), " · ".join(effort)]
    return [line for line in lines if line] or ["done" if run.finished else "nothing logged yet"]


def _model_origin_text(config: Mapping[str, Any]) -> str:
    """Return text on the origin of a run's model, or an empty string if it is unknown."""
    model = config.get("model")
    if isinstance(model, Mapping):
        if model.get("path"):
            return _stage_or_path_text(str(model["path"]))
        return "model from scratch" if model.get("scratch") else ""
    return _stage_or_path_text(str(model)) if model else ""


def _stage_or_path_text(path: str) -> str:
    """Return "from SFT" for the `final/` folder of the run `sft`, else the end of the path."""
    parts = path.rstrip("/").split("/")
    return (
        f"from {capitalize_acronyms(parts[-2])}"
        if parts[-1] == "final" and len(parts) > 1
        else _last_two_path_parts(path)
    )


def _env_or_dataset_text(config: Mapping[str, Any]) -> str:
    """Return the name of a run's environment, or the names of its datasets."""
    env = config.get("env")
    name = env.get("id") if isinstance(env, Mapping) else env
    if name:
        return str(name).split("/")[-1]
    data = (env.get("prompts") if isinstance(env, Mapping) else None) or config.get("data")
    sources = data if isinstance(data, list) else [data]
    names = [s.get("path") if isinstance(s, Mapping) else s for s in sources]
    return ", ".join(_last_two_path_parts(str(name)) for name in names if name)


def _last_two_path_parts(path: str) -> str:
    """Return the last two components of a path or hub id."""
    return "/".join(path.rstrip("/").split("/")[-2:])


def _run_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return (name, value) pairs of the known facts about a run.

    They are command, versions, machine, commit and date, then changes of settings and the origin of
    a branch.
    """
    env = run.environment
    command = env.get("command")
    versions = env.get("versions") or {}
    facts = [
        ("Command", " ".join(map(str, command)) if isinstance(command, list) else command),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)),
        ("Machine", ", ".join(str(env[k]) for k in ("processor", "platform") if env.get(k))),
        ("Commit", env.get("commit")),
        ("Date", env.get("date")),
    ]
    facts += [("Changed", change_text(row)) for row in run.changes]
    if run.origin:
        run_and_checkpoint = (run.origin.get("run"), run.origin.get("checkpoint"))
        facts.append(("Branched from", ", ".join(map(str, run_and_checkpoint))))
    return [(name, str(value)) for name, value in facts if value]
