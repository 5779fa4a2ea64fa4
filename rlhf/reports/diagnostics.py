"""What a reader should worry about before believing a run, and a watcher while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf.common.files import read_log
from rlhf.evaluation.records import RunRecord
from rlhf.reports.charts import short
from rlhf.reports.curves import gold_key, over_optimized
from rlhf.reports.markup import named

_SHARES = {
    "rollout/cut": (0.1, "replies hit the token limit"),
    "rollout/truncated": (0.1, "episodes were cut by a limit of tokens or steps"),
    "reward/unscored": (0.0, "episodes could not be scored"),
}

_UNSCORED = "rewards/unscored/"
"""Metrics ``rewards/unscored/NAME/REASON``: share of episodes."""

# Logged values that the last part of training is judged by.
_RECENT = 5
# A sign that holds for so many steps in a row is no chance (1 in 1,024).
_SURE = 10
# A look costs as much as there are rows; the next one comes when they grew by one part of these.
_CHECKS = 50


def alarms(run: RunRecord) -> list[str]:
    """Sentences about one run, most serious first; empty when nothing stands out."""
    found = [words for _, words in _findings(run, "at the end of training")]
    found += [*_unscored(run), *_evaluation_notes(run)]
    if run.metrics and not run.finished and not (run.directory / "final").exists():
        found.append(f"Not finished: the last logged step is {run.metrics[-1].get('step')}.")
    return [f"{named(run.name)}: {words}" for words in found]


class TrainingMonitor:
    """The same warnings while a run trains, each kind once.

    A resumed run is judged with the rows that it logged before: make one after they were rewound.

    Args:
        directory: of the run.
        config: of the run; ``gold`` names the rewards that only measure.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.rows = read_log(directory / "metrics.jsonl")
        self.record = RunRecord(directory, directory.name, config=config, metrics=self.rows)
        self.told: set[str] = set()
        self.due = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Sentences that became true; call it with every row that is logged.

        A long run is judged at every fiftieth part of its rows, so that watching stays cheap.
        """
        self.rows.append({"step": step, **metrics})
        if len(self.rows) < self.due:
            return []
        self.due = len(self.rows) + max(1, len(self.rows) // _CHECKS)
        fresh = []
        for kind, words in _findings(self.record, f"over the last {_RECENT} logged steps"):
            if kind not in self.told and self._lasts(kind):
                self.told.add(kind)
                fresh.append(words)
        return fresh

    def _lasts(self, kind: str) -> bool:
        """Whether a share was logged often enough to be told."""
        if kind.startswith(_UNSCORED):
            return len(self.rows) >= _RECENT
        if kind == "train/moved":  # a warm-up may hold the first steps
            warm_up = int(self.record.config.get("critic_warmup_steps") or 0)
            online = self.record.series("train/updates")[0]
            if not online:
                return len(self.record.series(kind)[0]) > 1
            return len([step for step in online if step > warm_up]) >= _RECENT
        recent = kind in _SHARES or kind.startswith("rollout/")
        return not recent or len(self.record.series(kind)[1]) >= _RECENT


def _findings(run: RunRecord, when: str) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of every rule on logged metrics that fires, most serious first.

    Args:
        run: with the rows so far.
        when: what the last logged values are called.
    """
    yield from (("finite", words) for words in _not_finite(run))
    yield from (("train/moved", words) for words in _unmoved(run))
    yield from (("gold", words) for words in _over_optimized(run))
    yield from _diverged(run)
    yield from (("entropy", words) for words in _collapsed(run))
    yield from (("eval/loss", words) for words in _overfitted(run))
    for key, (limit, words) in _SHARES.items():
        if (share := _ending(run, key)) > limit:
            yield key, f"{share:.0%} of {words} {when}."
    yield from _unscored_reasons(run, when)
    if (invalid := _ending(run, "rollout/invalid")) > 0.1:
        yield "rollout/invalid", f"{invalid:.2g} invalid actions per episode {when}."
    gains = run.series("rollout/evasion_gain")[1][-_SURE:]
    if len(gains) == _SURE and min(gains) > 0:
        yield (
            "rollout/evasion_gain",
            f"episodes with an invalid reply, or cut by a limit, earn {_mean(gains):.2g} more than "
            f"the others {when}: evading the task pays (see rollout.invalid_reward and "
            "rollout.max_tokens).",
        )
    unstopped = _ending(run, "rollout/missing_eos")
    # A cut reply has no stop token either; it is told once.
    if unstopped > 0.1 and unstopped > _ending(run, "rollout/cut") + 0.02:
        yield "rollout/missing_eos", f"{unstopped:.0%} of replies lack a stop token {when}."


def _unscored_reasons(run: RunRecord, when: str) -> Iterator[tuple[str, str]]:
    """Why episodes went unscored, by reward and reason; keys at 0 are not logged."""
    recent = run.metrics[-_RECENT:]
    keys = dict.fromkeys(key for row in recent for key in row if key.startswith(_UNSCORED))
    for key in keys:
        name, _, reason = key.removeprefix(_UNSCORED).partition("/")
        share = _mean([float(row.get(key, 0.0)) for row in recent])
        words = reason.replace("_", " ")
        yield key, f"{share:.0%} of episodes went unscored by {name} ({words}) {when}."


def _fell_clearly(values: Sequence[float]) -> bool:
    """Whether the last quarter's mean lies four standard errors below the best quarter's.

    The noise is that of neighboring values, which a trend hardly touches. Looking after every one
    of 100 noisy values without a trend, four errors are passed in about 2% of runs.
    """
    size = max(2, len(values) // 4)
    means = [math.fsum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
    squares = [(after - before) ** 2 for before, after in pairwise(values)]
    if not means or not squares:
        return False
    error = math.sqrt(math.fsum(squares) / len(squares) / 2) * math.sqrt(2 / size)
    return max(means) - means[-1] > 4 * error


def _ending(run: RunRecord, key: str) -> float:
    """Mean of the last five logged values; 0 for a metric that was never logged."""
    return _mean(run.series(key)[1][-_RECENT:])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _not_finite(run: RunRecord) -> list[str]:
    found: dict[str, int] = {}
    for row in run.metrics:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                found.setdefault(key, int(row.get("step", 0)))
    return [f"{key} is not finite from step {step} on." for key, step in found.items()]


def _unmoved(run: RunRecord) -> list[str]:
    """A model that training left as it was: a frozen policy, a rate of 0, advantages of 0."""
    steps, moved = run.series("train/moved")
    if moved and moved[-1] == 0:
        return [
            f"training did not move the model: at step {short(steps[-1])} every trained weight is "
            "what it was at the start."
        ]
    # Weights that start at 0 move by any rate, however small; what the policy says does not.
    kl, ratio = run.series("policy/kl")[1], run.series("policy/ratio_max")[1]
    if len(kl) < _RECENT or any(kl) or any(abs(r - 1) > 1e-6 for r in ratio):
        return []
    return [
        f"the policy did not move: policy/kl is 0 in all of {len(kl)} logged steps, and no "
        "importance ratio differs from 1."
    ]


def _over_optimized(run: RunRecord) -> list[str]:
    peak = over_optimized(run)
    if peak is None or not _fell_clearly(run.series(gold_key(run) or "")[1]):
        return []
    return [
        f"the proxy was over-optimized: gold fell from {short(peak.gold[0])} at step "
        f"{short(peak.step)} to {short(peak.gold[1])} while the proxy rose from "
        f"{short(peak.proxy[0])} to {short(peak.proxy[1])}. Stop near step {short(peak.step)}."
    ]


def _diverged(run: RunRecord) -> Iterator[tuple[str, str]]:
    for key, limit in (("policy/ratio_max", 20.0), ("policy/kl", 100.0)):
        steps, values = run.series(key)
        above = [i for i, value in enumerate(values) if value > limit]
        if above:
            yield (
                key,
                f"{key} reached {short(max(values))} (first above {short(limit)} at step "
                f"{short(steps[above[0]])}): the policy jumped far.",
            )


def _collapsed(run: RunRecord) -> list[str]:
    """Entropy that is gone although nothing was learned; a solved task needs none either."""
    entropy, reward = run.series("policy/entropy")[1], run.series("reward/mean")[1]
    if min(len(entropy), len(reward)) < 2 * _RECENT:
        return []
    before, after = _mean(entropy[:_RECENT]), _mean(entropy[-_RECENT:])
    first, last = _mean(reward[:_RECENT]), _mean(reward[-_RECENT:])
    if before < 0.1 or after > 0.05 * before or last > first:
        return []
    return [
        f"policy/entropy fell from {short(before)} to {short(after)} and the reward did not rise "
        f"({short(first)} to {short(last)}): the policy repeats itself and explores no more."
    ]


def _overfitted(run: RunRecord) -> list[str]:
    steps, values = run.series("eval/loss")
    if len(values) < 3:
        return []
    best = min(range(len(values)), key=values.__getitem__)
    if values[-1] <= 1.05 * values[best]:
        return []
    return [
        f"held-out loss rose from {short(values[best])} at step {short(steps[best])} to "
        f"{short(values[-1])}: it trained too long; final/ holds the model of step "
        f"{short(steps[best])}."
    ]


def _unscored(run: RunRecord) -> Sequence[str]:
    rows = [row for e in run.evaluations for row in e.episodes]
    missing = sum(row.get("return") is None for row in rows)
    return [f"{missing} of {len(rows)} evaluation episodes have no return."] if missing else []


def _evaluation_notes(run: RunRecord) -> list[str]:
    """What the summaries of a run's evaluations note, with the policy where there are several."""
    several = len(run.evaluations) > 1
    return [
        f"{evaluation.describe('policy')}: {note}." if several else f"evaluation: {note}."
        for evaluation in run.evaluations
        for note in evaluation.summary.get("notes") or ()
    ]
