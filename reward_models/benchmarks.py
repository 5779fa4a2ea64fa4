"""Evaluate rewards on local rows of public benchmarks: RewardBench 1 and 2, RM-Bench, JudgeBench.

Rows come from the files of the benchmarks; nothing is downloaded. Each benchmark function returns a
dict with the scores as plain numbers. In addition to the published scores, it has these keys:

- ``unscored``: number of replies that the reward could not score; their rows count as wrong
  (in RM-Bench, only their comparisons).
- ``intervals``: name of each score -> 95% interval, clustered by prompt. The name of a nested score
  contains all its keys, such as ``sections / Chat`` or ``domains / chat / easy``. The interval of a
  section combines the intervals of its subsets.
- ``rows``: number of rows of each part.
- ``absent`` (not in JudgeBench): parts without rows. If there are any, the score is not comparable
  with published scores.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, Reward, as_messages
from rlhf.stats import Interval, interval, jackknife
from rlhf.stats.jackknife import weighted_sum_interval

Row = Mapping[str, Any]
NestedScores = Mapping[str, Any]
"""Name of a score -> estimate with its interval, or the scores of the parts."""

REWARD_BENCH_SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": (
        "alpacaeval-easy",
        "alpacaeval-length",
        "alpacaeval-hard",
        "mt-bench-easy",
        "mt-bench-med",
    ),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": (
        "math-prm",
        "hep-cpp",
        "hep-go",
        "hep-java",
        "hep-js",
        "hep-python",
        "hep-rust",
    ),
}
"""Subsets of each section of RewardBench 1 (2403.13787)."""

REWARD_BENCH_2_SUBSETS = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")
"""Subsets of RewardBench 2 (2506.01937)."""

RM_BENCH_DOMAINS = ("chat", "code", "math", "safety")
"""Domains of RM-Bench (2410.16184)."""

# Weight of math-prm in its section: the number of prompts of all code subsets, instead of its own
# 447 prompts.
_MATH_PRM_WEIGHT = 984


def reward_bench(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """Return the accuracy on RewardBench 1 (2403.13787).

    A pair is right if the chosen reply scores strictly higher. The score of a section is the mean
    over its subsets, weighted by their numbers of rows (984 for ``math-prm``). The score of the
    benchmark is the mean of the sections that have rows.

    Args:
        reward: The reward to evaluate.
        rows: Rows with ``prompt``, ``chosen``, ``rejected`` and ``subset``.

    Raises:
        UserError: A subset is unknown, or there are no rows.
    """
    rows = list(rows)
    items = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    values, unscored = _scores_and_unscored_count(reward, items)
    counts = Counter(row["subset"] for row in rows)
    known = {subset for subsets in REWARD_BENCH_SECTIONS.values() for subset in subsets}
    if unknown := sorted(set(counts) - known):
        raise UserError(f"RewardBench has no subset {unknown[0]!r}")
    right = values[: len(rows)] > values[len(rows) :]
    subsets = _mean_by_part(rows, right, part_key="subset")
    weights = {**counts, "math-prm": _MATH_PRM_WEIGHT}
    sections = {
        section: _weighted_mean({name: subsets[name] for name in present}, weights)
        for section, names in REWARD_BENCH_SECTIONS.items()
        if (present := [name for name in names if name in subsets])
    }
    scores = {"score": _weighted_mean(sections), "sections": sections, "subsets": subsets}
    absent = sorted(set(REWARD_BENCH_SECTIONS) - set(sections)) + sorted(known - set(subsets))
    return _benchmark_result(scores, unscored, counts) | {"absent": absent}


def reward_bench_2(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """Return the accuracy on RewardBench 2 (2506.01937), a best-of-four task.

    A row is right if a chosen reply has the highest score. If k replies, at least one of them
    chosen, share the highest score, the row counts 1/k. The score of the subset ``Ties`` is
    :func:`ties_score`. The score of the benchmark is the mean of the subsets that have rows.

    Args:
        reward: The reward to evaluate.
        rows: Rows with ``prompt``, ``chosen`` (list), ``rejected`` (list) and ``subset``. Rows of
            ``Ties`` also have ``id`` ("ref:n" or "tied:n").

    Raises:
        UserError: A subset or the id of a row of Ties is unknown, or there are no rows.
    """
    rows = list(rows)
    names = {row["subset"] for row in rows if row["subset"].lower() != "ties"}
    if unknown := sorted(names - set(REWARD_BENCH_2_SUBSETS)):
        raise UserError(f"RewardBench 2 has no subset {unknown[0]!r}")
    items = [(row["prompt"], reply) for row in rows for reply in [*row["chosen"], *row["rejected"]]]
    values, unscored = _scores_and_unscored_count(reward, items)
    sizes = [len(row["chosen"]) + len(row["rejected"]) for row in rows]
    others: list[Row] = []
    points: list[float] = []
    ties: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for row, scores in zip(rows, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
        good, bad = np.split(scores, [len(row["chosen"])])
        if row["subset"].lower() == "ties":
            if not re.fullmatch(r"(ref|tied):.+", row_id := str(row["id"])):
                raise UserError(
                    f"RewardBench 2: the id of a row of Ties is ref:n or tied:n, got {row_id!r}"
                )
            ties[row_id] = (good, bad)
        else:
            others.append(row)
            points.append(_best_of_credit(good, bad))
    subsets = _mean_by_part(others, np.array(points), part_key="subset")
    counts = Counter(row["subset"] for row in others)
    if ties:
        subsets["Ties"], counts["Ties"] = _ties_interval(ties), len(ties)
    result = _benchmark_result(
        {"score": _weighted_mean(subsets), "subsets": subsets}, unscored, counts
    )
    return result | {"absent": [name for name in REWARD_BENCH_2_SUBSETS if name not in subsets]}


def _best_of_credit(good_scores: np.ndarray, bad_scores: np.ndarray) -> float:
    """Return the credit of a row, given the scores of its good and of its bad replies.

    It is 1/k if k replies share the highest score and at least one of them is good, else 0. It is
    also 0 if a score is nan.
    """
    scores = np.concatenate([good_scores, bad_scores])
    if np.isnan(scores).any():
        return 0.0
    top = scores == scores.max()
    return float(top[: len(good_scores)].sum() > 0) / float(top.sum())


def ties_score(scores_by_prompt: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the score of the subset Ties of RewardBench 2 (2506.01937).

    The right answers to a tied prompt should have similar scores, above the scores of all wrong
    answers. For a tied prompt, the spread is the difference between the highest and the lowest
    score of its right answers. The gap of a prompt is the lowest score of a right answer minus the
    highest score of a wrong answer. The smaller gap is the smaller of the gaps of the tied prompt
    and of the reference prompt with the same number. The score is the sum of

    - 0.3 times the accuracy on the tied prompts;
    - 0.3 times the accuracy on the reference prompts (in both cases, a prompt is correct if every
      right answer scores above every wrong answer);
    - 0.2 times the fraction of tied prompts whose gap exceeds the spread;
    - 0.2 times the fraction of tied prompts whose smaller gap exceeds the spread;
    - 0.01 times the mean of tanh(smaller gap / spread - 1).

    The last three terms use only the tied prompts that have a reference prompt.

    Args:
        scores_by_prompt: "ref:n" (reference prompt, with one right answer) or "tied:n" (tied
            prompt, with several) -> scores of the right answers, and scores of the wrong answers.
    """
    accurate = {group: [] for group in ("ref", "tied")}
    for key, (good, bad) in scores_by_prompt.items():
        accurate[key.partition(":")[0]].append(bool(good.min() > bad.max()))
    beyond, hard, clear = [], [], []
    for key, (good, bad) in scores_by_prompt.items():
        group, _, number = key.partition(":")
        if group != "tied" or f"ref:{number}" not in scores_by_prompt:
            continue
        spread = float(good.max() - good.min())
        gap = float(good.min() - bad.max())
        reference_good, reference_bad = scores_by_prompt[f"ref:{number}"]
        reference_gap = float(reference_good.min() - reference_bad.max())
        beyond.append(gap > spread)
        smaller_gap = float(np.minimum(gap, reference_gap))  # nan if one of them is nan
        hard.append(smaller_gap > spread)
        clear.append(_gap_to_spread_score(smaller_gap, spread))
    parts = [accurate["tied"], accurate["ref"], beyond, hard, clear]
    means = [float(np.mean(part)) if part else 0.0 for part in parts]
    return sum(w * m for w, m in zip((0.3, 0.3, 0.2, 0.2, 0.01), means, strict=True))


def _ties_interval(scores_by_prompt: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Interval:
    """Return the interval of `ties_score`; a reference prompt and its tied prompt are one unit."""
    keys = list(scores_by_prompt)

    def score(rows: np.ndarray) -> float:
        return ties_score({keys[row]: scores_by_prompt[keys[row]] for row in rows})

    return jackknife(score, [key.partition(":")[2] for key in keys])


def _gap_to_spread_score(gap: float, spread: float) -> float:
    """Return tanh(gap / spread - 1), the sign of the gap if the spread is 0, or 0 for nan."""
    if math.isnan(gap) or math.isnan(spread):
        return 0.0
    return math.tanh(gap / spread - 1) if spread > 0 else float(np.sign(gap))


def rm_bench(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """Return the accuracy on RM-Bench (2410.16184), which varies the style of the replies.

    Each row gives 3 x 3 comparisons of a chosen reply of style i with a rejected reply of style j.
    A comparison is ``easy`` if the chosen reply has the richer style (i > j), ``normal`` if the
    styles are equal, and ``hard`` if the chosen reply has the plainer style. The accuracies are
    averaged within each domain (for safety, over its two parts), and then over domains. The score
    is the mean of the three levels.

    Args:
        reward: The reward to evaluate.
        rows: Rows with ``prompt``, ``domain``, ``chosen`` and ``rejected``. Chosen and rejected
            replies have three styles each (concise, detailed, detailed with Markdown).

    Raises:
        UserError: A row does not have three chosen and three rejected replies, or there are no
            rows.
    """
    rows = list(rows)
    items = [
        (row["prompt"], r) for row in rows for side in ("chosen", "rejected") for r in row[side]
    ]
    if any(len(row[side]) != 3 for row in rows for side in ("chosen", "rejected")):
        raise UserError("every row of RM-Bench needs three chosen and three rejected replies")
    values, unscored = _scores_and_unscored_count(reward, items)
    styles = values.reshape(len(rows), 2, 3)
    wins = styles[:, 0, :, None] > styles[:, 1, None, :]
    i, j = np.indices((3, 3))
    # Each level has three of the nine comparisons, so the mean of the levels is the overall mean.
    levels = {"score": i >= 0, "easy": i > j, "normal": i == j, "hard": i < j}
    domains: dict[str, dict[str, Interval]] = defaultdict(dict)
    for level, compared in levels.items():
        by_part: dict[str, dict[str, Interval]] = defaultdict(dict)
        for part, rate in _mean_by_part(rows, wins[:, compared].mean(1), part_key="domain").items():
            by_part[part.partition("-")[0]][part] = rate
        for domain, rates in by_part.items():
            domains[domain][level] = _weighted_mean(rates)
    means = {
        level: _weighted_mean({domain: rates[level] for domain, rates in domains.items()})
        for level in levels
    }
    counts = Counter(row["domain"] for row in rows)
    result = _benchmark_result({**means, "domains": domains}, unscored, counts)
    return result | {"absent": [name for name in RM_BENCH_DOMAINS if name not in domains]}


def judge_bench(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """Return the accuracy on JudgeBench (2410.12784).

    A row is right if the better reply scores strictly higher.

    Args:
        reward: The reward to evaluate.
        rows: Rows with ``question``, ``response_A``, ``response_B``, ``label`` ("A>B" or "B>A") and
            ``source``.

    Raises:
        UserError: A label is unknown, or there are no rows.
    """
    rows = list(rows)
    if odd := [row["label"] for row in rows if row["label"] not in ("A>B", "B>A")]:
        raise UserError(f"JudgeBench labels are 'A>B' or 'B>A', got {odd[0]!r}")
    items = [(row["question"], row[f"response_{side}"]) for side in "AB" for row in rows]
    values, unscored = _scores_and_unscored_count(reward, items)
    signs = np.array([1.0 if row["label"] == "A>B" else -1.0 for row in rows])
    right = (values[: len(rows)] - values[len(rows) :]) * signs > 0
    scores = {
        "score": _mean_with_interval(right, [row["question"] for row in rows]),
        "sources": _mean_by_part(rows, right, part_key="source", prompt_key="question"),
    }
    return _benchmark_result(scores, unscored, Counter(str(row["source"]) for row in rows))


def _scores_and_unscored_count(
    reward: Reward, prompt_reply_pairs: Sequence[tuple[Any, str]]
) -> tuple[np.ndarray, int]:
    """Score N items (prompt, reply).

    Returns:
        The scores [N], which are nan for replies that could not be scored, and the number of nan.

    Raises:
        UserError: There are no items.
    """
    if not prompt_reply_pairs:
        raise UserError("a benchmark needs at least one row")
    conversations = [
        [*as_messages(p, "user"), {"role": "assistant", "content": r}]
        for p, r in prompt_reply_pairs
    ]
    values = np.array(reward(conversations), dtype=float)
    return values, int(np.isnan(values).sum())


def _mean_by_part(
    rows: Sequence[Row], values: np.ndarray, *, part_key: str, prompt_key: str = "prompt"
) -> dict[str, Interval]:
    """Return the mean of ``values`` [N] of the rows of each part, with its interval.

    In a row, ``part_key`` is the key of the name of its part, and ``prompt_key`` is the key of its
    prompt.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        members[str(row[part_key])].append(i)
    return {
        name: _mean_with_interval(values[indices], [rows[i][prompt_key] for i in indices])
        for name, indices in sorted(members.items())
    }


def _mean_with_interval(values: np.ndarray, prompts: Sequence[str | Conversation]) -> Interval:
    """Return the mean of values [N] in [0, 1] with its interval; equal prompts are one unit."""
    units = [p if isinstance(p, str) else json.dumps(p, sort_keys=True) for p in prompts]
    return interval(values, units, bounds=(0.0, 1.0), weigh="values")


def _weighted_mean(
    parts: Mapping[str, Interval], weights: Mapping[str, int] | None = None
) -> Interval:
    """Return the weighted mean of independent parts with its interval.

    By default, the parts have equal weights.
    """
    numbers = [1 if weights is None else weights[name] for name in parts]
    return weighted_sum_interval(
        list(parts.values()), [number / sum(numbers) for number in numbers]
    )


def _benchmark_result(
    scores: NestedScores, unscored: int, row_counts: Mapping[str, int]
) -> dict[str, Any]:
    """Convert scores to the result of a benchmark, which the module's docstring describes."""
    counts = dict(sorted(row_counts.items()))
    return {
        **_estimates_without_intervals(scores),
        "unscored": unscored,
        "intervals": _interval_ends(scores),
        "rows": counts,
    }


def _estimates_without_intervals(scores: NestedScores) -> dict[str, Any]:
    """Return the nested scores with plain numbers instead of intervals."""
    return {
        name: part.value if isinstance(part, Interval) else _estimates_without_intervals(part)
        for name, part in scores.items()
    }


def _interval_ends(scores: NestedScores, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return name -> interval ends and number of prompts; unknown ends are None."""
    limits: dict[str, dict[str, Any]] = {}
    for name, part in scores.items():
        if isinstance(part, Interval):
            low, high = (part.low, part.high) if part.known else (None, None)
            limits[prefix + name] = {"low": low, "high": high, "prompts": part.units}
        else:
            limits |= _interval_ends(part, f"{prefix}{name} / ")
    return limits
