"""Convert a benchmark's result to tables, Markdown and a dictionary for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf import __version__
from rlhf.common.text import escape_markdown, markdown_table
from rlhf.evaluation.compare import format_estimate, simulated_coverage_text
from rlhf.evaluation.significance import Difference
from rlhf.reports.markup import Cell, Table
from rlhf.runs.machine import describe_machine
from rlhf.studies.bench.plan import Bench
from rlhf.studies.bench.scores import SCORE_METRIC, THRESHOLDS, BenchScores, Findings


def make_bench_tables(scores: BenchScores, findings: Findings, *, baseline: str) -> list[Table]:
    """Return the tables of a benchmark's result.

    They contain the aggregates, the scores by environment, the comparisons, the curves, the
    performance profiles and the scores of all runs. `baseline` is the name of the row with which
    the other rows are compared.
    """
    total: list[list[Cell]] = [
        [
            name,
            *row.values(),
            findings.improvement.get(name),
            float(scores.scores_by_row[name].min()),
        ]
        for name, row in findings.aggregates.items()
    ]
    columns = ["policy", "IQM", "mean", "optimality gap", f"P(better than {baseline})", "worst run"]
    cells: list[list[Cell]] = [
        [name, *(row.get(env) for env in scores.environments)]
        for name, row in findings.cells.items()
    ]
    profile: list[list[Cell]] = [
        [name, *map(float, shares)] for name, shares in findings.profile.items()
    ]
    verdicts: list[list[Cell]] = [
        [f"{d.method} − {d.baseline}", d.estimate, d.verdict] for d in findings.differences
    ]
    points = len(next(iter(findings.curves.values())))
    shares = [f"{index / (points - 1):.0%}" for index in range(points)]
    single: list[list[Cell]] = [
        [name, env, seed if len(table) > 1 else None, float(table[i, j])]
        for name, table in scores.scores_by_row.items()
        for i, seed in enumerate(scores.seeds[: len(table)])
        for j, env in enumerate(scores.environments)
        if math.isfinite(table[i, j])
    ]
    return [
        Table("aggregates", "Over all environments", columns, total),
        Table("cells", "By environment", ["policy", *scores.environments], cells),
        Table("verdicts", "Differences", ["difference", "mean", "verdict"], verdicts),
        Table(
            "curves",
            "IQM during training",
            ["policy", *shares],
            [[name, *curve] for name, curve in findings.curves.items()],
        ),
        Table(
            "profile",
            "Share of runs above a score",
            ["policy", *(f"{t:g}" for t in THRESHOLDS)],
            profile,
        ),
        Table("scores", "Every run", ["policy", "environment", "seed", SCORE_METRIC], single),
    ]


def bench_json_content(bench: Bench, scores: BenchScores, findings: Findings) -> dict[str, Any]:
    """Return the content of `bench.json`, which `rlhf bench --against` reads."""
    config = asdict(bench.config)
    return {
        "manifest": {k: v for k, v in config.items() if k not in ("resume", "overwrite")},
        "machine": describe_machine(),
        "environments": {name: asdict(b) for name, b in scores.reference_returns.items()},
        "training_episodes": training_episode_counts(bench),
        "seeds": list(scores.seeds),
        "scores": {
            row: {
                env: table[:, i].tolist()
                for i, env in enumerate(scores.environments)
                if env in findings.cells[row]
            }
            for row, table in scores.scores_by_row.items()
        },
        "curves": {row: curves.tolist() for row, curves in scores.curves.items()},
        "aggregates": {
            row: {name: estimate.as_dict() for name, estimate in aggregates.items()}
            for row, aggregates in findings.aggregates.items()
        },
        "improvement": {row: e.as_dict() for row, e in findings.improvement.items()},
        "verdicts": [
            {
                "method": d.method,
                "against": d.baseline,
                "difference": d.estimate.as_dict(),
                "winner": d.winner,
                "verdict": d.verdict,
            }
            for d in findings.differences
        ],
    }


def training_episode_counts(bench: Bench) -> dict[str, dict[str, int]]:
    """Return environment -> algorithm -> number of training episodes of one run."""
    seed = bench.config.seeds[0]

    def episodes_of_one_run(environment: str, algorithm: str) -> int:
        tree = bench.run_config_tree(environment, algorithm, seed)
        config = bench.commands.config_from_tree(bench.command_of(algorithm), tree)
        return config.num_steps * config.episodes_per_step

    return {
        env: {name: episodes_of_one_run(env, name) for name in bench.algorithms}
        for env in bench.environments
    }


def protocol_sentences(bench: Bench) -> list[str]:
    """Return the sentences that describe how the benchmark was run."""
    config = bench.config
    lines = [
        f"{len(bench.algorithms)} algorithms on {len(bench.environments)} environments with "
        f"{len(config.seeds)} training seeds ({', '.join(map(str, config.seeds))}). Scores are "
        "(return − random) / (optimal − random), from the last model of each run on the same "
        f"{config.episodes} held-out episodes ({config.decoding} decoding). In each environment "
        f"and seed, all algorithms start from the same model, the row {bench.initial_row_name}."
    ]
    for row in bench.untrained_rows:
        names = [name for name in bench.environments if row in bench.untrained_rows_of(name)]
        if len(names) < len(bench.environments):
            lines.append(
                f"The row {row} exists only in {', '.join(names)}, so it has no value over all "
                "environments."
            )
    equal_budgets = []
    for env, counts in training_episode_counts(bench).items():
        if len(set(counts.values())) > 1:
            parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            lines.append(f"Budgets differ on {env}: {parts} training episodes.")
        else:
            equal_budgets.append(f"{env} {next(iter(counts.values())):,}")
    if equal_budgets:
        lines.append(f"Training episodes of each algorithm: {', '.join(equal_budgets)}.")
    lines.append(_tuning_sentence(config.tuning, bench.algorithms))
    return lines


def _tuning_sentence(tuning: Mapping[str, Any], algorithms: Iterable[str]) -> str:
    """Return the sentence on the tuning of the algorithms' settings."""
    if not tuning:
        return "The settings were not tuned by `rlhf tune`; any algorithm may have better settings."
    untuned = [name for name in algorithms if name not in tuning["algorithms"]]
    extra = f" Not tuned: {', '.join(untuned)}." if untuned else ""
    return (
        f"The settings were tuned with {tuning['trials']} trials for each of "
        f"{', '.join(tuning['algorithms'])}, on seeds {', '.join(map(str, tuning['seeds']))} and "
        f"on episodes that are not used in this comparison.{extra}"
    )


def bench_markdown(bench: Bench, findings: Findings, tables: Sequence[Table]) -> str:
    """Return the content of `bench.md`."""
    by_slug = {table.slug: table for table in tables}
    title = escape_markdown(bench.root.resolve().name)
    parts = [f"# {title}", "\n\n".join([*protocol_sentences(bench), _version_sentence()])]
    parts += [_markdown_section(by_slug[slug]) for slug in ("aggregates", "cells")]
    lines = [f"* {escape_markdown(line)}" for line in verdict_lines(findings)]
    parts.append("## Verdicts\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, _markdown_section(by_slug["curves"])]) + "\n"


def _markdown_section(table: Table) -> str:
    """Return a table as Markdown with its title as the heading."""
    cells = [[_cell_text(cell) for cell in row] for row in table.rows]
    return f"## {table.title}\n\n{markdown_table(table.columns, cells).rstrip()}"


def _version_sentence() -> str:
    machine = describe_machine()
    commit = f" ({machine['commit'][:7]})" if machine["commit"] else ""
    return (
        f"rlhf {__version__}{commit}, torch {machine['versions']['torch']}, "
        f"{machine['processor'] or machine['platform']}."
    )


def verdict_lines(findings: Findings) -> list[str]:
    """Return the results of the comparisons as lines of text.

    The lines are, in this order:

    - the result of each comparison with the baseline
    - the result for each pair of algorithms that differ significantly
    - the number of the other pairs
    - the simulated coverage of the intervals
    """
    lines = [_verdict_line(d) for d in findings.against_baseline]
    significant = [d for d in findings.pairs if d.winner]
    lines += [_verdict_line(d) for d in significant]
    if others := len(findings.pairs) - len(significant):
        lines.append(
            f"{others} of {len(findings.pairs)} pairs of algorithms have no winner "
            "(each pair is tested at significance level "
            f"{0.05 / len(findings.differences):.2%}, Bonferroni)"
        )
    return lines + [text for d in findings.differences[:1] if (text := simulated_coverage_text(d))]


def _verdict_line(difference: Difference) -> str:
    """Return a verdict with the mean difference and its interval."""
    return f"{difference.verdict}: mean difference {format_estimate(difference.estimate)}"


def _cell_text(cell: Cell) -> str:
    """Return a cell as text; numbers other than integers have two decimals."""
    if cell is None:
        return "–"
    if isinstance(cell, str | int):
        return str(cell)
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return f"{cell.value:.2f}" + (f" [{cell.low:.2f}, {cell.high:.2f}]" if cell.known else "")
