"""Cross-validate a reward model: score each pair by a model trained on other conversations.

    python -m benchmarks.reward_folds --config configs/rewards/harmless.yaml

In a small dataset, a test split has few pairs. With cross-validation, every pair is tested once.
Conversations with the same first message are in the same fold and form one independent unit of the
confidence intervals. The script has the options of `rlhf reward` and the option `--folds N`. The
results are written to `folds.json` and `folds.md` in the output folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.cli.arguments import parse_arguments
from rlhf.cli.table import configure, run_command
from rlhf.common.files import write_jsonl
from rlhf.config.load import assemble_tree_and_load_plugins
from rlhf.data.load import load
from rlhf.data.splits import fold_of_each_row
from rlhf.reward_models import LearnedReward
from rlhf.reward_models.core import Reward
from rlhf.reward_models.pairs import Pair, to_pair
from rlhf.reward_models.report.baselines import bag_of_words_margins, length_differences
from rlhf.reward_models.report.intervals import paired_difference_interval, proportion_interval
from rlhf.runs import launch


def main(arguments: Sequence[str]) -> None:
    """Train and evaluate every fold; write and print the results over all folds."""
    launch.prepare_process()
    parsed = parse_arguments(arguments)
    folds = next((value for key, value in parsed.overrides if key == "folds"), 5)
    tree = assemble_tree_and_load_plugins(
        parsed.files, [item for item in parsed.overrides if item[0] != "folds"]
    )
    config = configure("reward", tree)
    rows = load(config.data, "preference", seed=config.seed).rows
    opening = [{"prompt": row["prompt"][:1]} for row in rows]
    fold = np.array(fold_of_each_row(opening, folds, seed=config.seed))
    pairs = [to_pair(row) for row in rows]
    margins = {name: np.full(len(rows), np.nan) for name in ("this model", "bag of words")}
    for k in range(folds):
        held_out = fold == k
        final = train_fold(asdict(config), rows, held_out, Path(config.output_dir) / f"fold{k}")
        out = [pair for pair, there in zip(pairs, held_out, strict=True) if there]
        rest = [pair for pair, there in zip(pairs, held_out, strict=True) if not there]
        margins["this model"][held_out] = score_margins(LearnedReward.load(final), out)
        margins["bag of words"][held_out] = bag_of_words_margins(out, train=rest)
    margins |= {
        "longer wins": length_differences(pairs),
        "shorter wins": -length_differences(pairs),
    }
    groups = [json.dumps(row["prompt"]) for row in opening]
    report = accuracies_and_gains(margins, groups) | {"pairs": len(rows), "folds": folds}
    folder = Path(config.output_dir)
    (folder / "folds.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "folds.md").write_text(to_markdown(report))
    print(to_markdown(report))


def train_fold(
    tree: dict[str, Any], rows: list[dict[str, Any]], held_out: np.ndarray, folder: Path
) -> Path:
    """Train a reward model on the rows that are not held out, unless its run is finished.

    Args:
        tree: configuration of the training.
        rows: canonical preference rows.
        held_out: [rows] whether each row is held out.
        folder: run directory of the fold.

    Returns:
        The folder of the trained model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.with_suffix(".jsonl")
    write_jsonl(data, [row for row, out in zip(rows, held_out, strict=True) if not out])
    resume = (folder / "config.yaml").exists()
    changed = {"output_dir": str(folder), "data": [{"path": str(data)}], "resume": resume}
    return run_command("reward", tree | changed)


def score_margins(reward: Reward, pairs: list[Pair]) -> np.ndarray:
    """Return the score of the chosen reply minus the score of the rejected reply, [pairs]."""
    scores = np.array(reward([p.chosen for p in pairs] + [p.rejected for p in pairs]), dtype=float)
    return scores[: len(pairs)] - scores[len(pairs) :]


def accuracies_and_gains(
    margins: dict[str, np.ndarray], groups: list[str]
) -> dict[str, dict[str, Any]]:
    """Return the accuracy of each scorer, and the paired gain of the model over the other scorers.

    Args:
        margins: scorer -> margin of each pair, [pairs]. A margin of 0 counts as 1/2.
        groups: independent unit of each pair, [pairs].
    """
    right = {name: (np.sign(margin) + 1) / 2 for name, margin in margins.items()}
    ours = right["this model"]
    return {
        "accuracy": {n: proportion_interval(r, groups) for n, r in right.items()},
        "gain": {
            name: paired_difference_interval(ours - theirs, groups)
            for name, theirs in right.items()
            if name != "this model"
        },
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return a Markdown table with 95% intervals."""
    lines = [f"{report['pairs']:,} pairs in {report['folds']} folds", ""]
    lines += ["| | accuracy | gain of the model |", "|-|-|-|"]
    for name, value in report["accuracy"].items():
        gain = report["gain"].get(name)
        lines.append(
            f"| {name} | {_interval_text(value)} | {_interval_text(gain) if gain else ''} |"
        )
    return "\n".join(lines) + "\n"


def _interval_text(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


if __name__ == "__main__":
    main(sys.argv[1:])
