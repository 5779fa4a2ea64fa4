"""Compare the disagreement of an ensemble on in-distribution texts and on other texts.

    rlhf reward --config configs/rewards/ensemble.yaml
    python -m benchmarks.reward_disagreement runs/ensemble/final inside.jsonl outside.jsonl ...

Each file has a column of texts. The column is COLUMN in the argument `FILE:COLUMN`, and otherwise
`text` or another name that the loader recognizes. The first file contains texts from the training
distribution ("inside"), and the other files contain other texts ("outside"). The disagreement on a
text is the standard deviation of the scores of the heads. The script prints the mean disagreement
on each file. For each outside file, it prints the proportion of (inside, outside) pairs in which
the outside text has the larger disagreement. All intervals are over texts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from rlhf.config.data import DataSpec
from rlhf.data.load import load
from rlhf.reward_models import build
from rlhf.reward_models.report.labeled import macro_auc
from rlhf.runs import launch
from rlhf.stats import Interval, interval, jackknife

NUM_TEXTS = 1000
"""Maximum number of texts of a file."""


def main(arguments: Sequence[str]) -> None:
    """Print one line for each file, and one line for each comparison with the first file."""
    launch.prepare_process()
    checkpoint, inside, *outside = arguments
    reward = build({"kind": "trained", "path": checkpoint})
    found = {name: head_disagreement(reward, name) for name in (inside, *outside)}
    for name, values in found.items():
        print(f"{name}: {len(values):,} texts, disagreement {_interval_text(interval(values))}")
    for name in outside:
        share = probability_outside_larger(found[inside], found[name])
        print(f"P({name} > {inside}): {_interval_text(share)}")


def head_disagreement(reward, source: str) -> np.ndarray:
    """Return the disagreement of the heads on each of the N texts of a file, [N]."""
    path, _, column = source.partition(":")
    spec = DataSpec(path, limit=NUM_TEXTS, columns={"text": column} if column else None)
    rows = load(spec, "text", seed=0).rows
    scores = reward.score([[{"role": "assistant", "content": row["text"]}] for row in rows])
    return np.array(scores.components[f"{reward.name}.disagreement"], dtype=float)


def probability_outside_larger(inside: np.ndarray, outside: np.ndarray) -> Interval:
    """Return the probability that an outside text has a larger disagreement than an inside text.

    A tie counts as 1/2. The interval is over texts.
    """
    labels = np.repeat([0, 1], [len(inside), len(outside)])
    both = np.concatenate([inside, outside])
    scores = np.stack([-both, both], 1)
    return jackknife(
        lambda rows: macro_auc(scores[rows], labels[rows]), np.arange(len(labels)), scale="logit"
    )


def _interval_text(value: Interval) -> str:
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"


if __name__ == "__main__":
    main(sys.argv[1:])
