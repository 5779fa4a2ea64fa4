"""Public reward benchmarks from local rows: RewardBench 1 and 2, RM-Bench, JudgeBench.

Rows come from the files of the benchmarks; nothing is downloaded. Each function returns plain
numbers. An item that the reward cannot score counts as wrong and is reported under ``unscored``. In
addition to the published scores, the results contain ``intervals`` (95%, clustered by prompt; the
interval of a section combines those of its subsets), ``rows`` (number of rows of each part) and
``absent`` (parts without rows). A score with absent parts cannot be compared with published ones.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.errors import UserError
from rlhf.reward_models.core import Conversation, Reward
from rlhf.stats import Interval, interval, jackknife, weighted_sum

Row = Mapping[str, Any]

SECTIONS: dict[str, tuple[str, ...]] = {
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

SUBSETS_2 = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")
"""Subsets of RewardBench 2 (2506.01937)."""

DOMAINS = ("chat", "code", "math", "safety")
"""Domains of RM-Bench (2410.16184)."""

_MATH_PRM_WEIGHT = 984  # the number of prompts of all code subsets, instead of its own 447


def _prompt(prompt: str | Conversation) -> Conversation:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _scores(reward: Reward, items: Sequence[tuple[Any, str]]) -> tuple[np.ndarray, int]:
    """Scores of (prompt, reply) items [N], nan where there is none, and the number of nan."""
    conversations = [[*_prompt(p), {"role": "assistant", "content": r}] for p, r in items]
    values = np.array([math.nan if v is None else v for v in reward(conversations)])
    return values, int(np.isnan(values).sum())


def reward_bench(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """RewardBench 1: rows of ``prompt``, ``chosen``, ``rejected``, ``subset``.

    A pair is right if the chosen reply scores strictly higher. Sections weight their subsets by the
    number of prompts (``math-prm`` as 984); the score is the mean of the sections with rows.

    Raises:
        UserError: A subset is unknown.
    """
    rows = list(rows)
    items = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    values, unscored = _scores(reward, items)
    right: dict[str, list[float]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)
    for row, won in zip(rows, values[: len(rows)] > values[len(rows) :], strict=True):
        right[row["subset"]].append(float(won))
        prompts[row["subset"]].append(_key(row["prompt"]))
    known = {subset for subsets in SECTIONS.values() for subset in subsets}
    if unknown := sorted(set(right) - known):
        raise UserError(f"RewardBench has no subset {unknown[0]!r}")
    subsets = {name: sum(wins) / len(wins) for name, wins in sorted(right.items())}
    weights = {
        name: _MATH_PRM_WEIGHT if name == "math-prm" else len(wins) for name, wins in right.items()
    }
    sections = {
        section: sum(subsets[n] * weights[n] for n in present) / sum(weights[n] for n in present)
        for section, names in SECTIONS.items()
        if (present := [n for n in names if n in subsets])
    }
    score = sum(sections.values()) / len(sections)
    by_subset = {name: _accuracy(wins, prompts[name]) for name, wins in right.items()}
    by_section = {
        section: _weighted(by_subset, {n: weights[n] for n in SECTIONS[section] if n in by_subset})
        for section in sections
    }
    return {
        "score": score,
        "sections": sections,
        "subsets": subsets,
        "unscored": unscored,
        "intervals": _intervals(
            {
                "score": _weighted(by_section, dict.fromkeys(by_section, 1.0)),
                **{f"sections / {name}": value for name, value in by_section.items()},
                **{f"subsets / {name}": by_subset[name] for name in subsets},
            }
        ),
        "rows": {name: len(wins) for name, wins in sorted(right.items())},
        "absent": sorted(set(SECTIONS) - set(sections)) + sorted(known - set(right)),
    }


def reward_bench_2(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """RewardBench 2 (2506.01937): best of four.

    A row is right if a chosen reply has the highest score; if k replies share it, it counts 1/k.
    ``Ties`` is scored by :func:`ties_score`. The score is the mean of the subsets.

    Args:
        reward: The reward under test.
        rows: Rows of ``prompt``, ``chosen`` (list), ``rejected`` (list) and ``subset``; ``Ties``
            rows also have ``id`` ("ref:n" or "tied:n").
    """
    rows = list(rows)
    items = [(row["prompt"], reply) for row in rows for reply in [*row["chosen"], *row["rejected"]]]
    values, unscored = _scores(reward, items)
    sizes = [len(row["chosen"]) + len(row["rejected"]) for row in rows]
    parts = np.split(values, np.cumsum(sizes)[:-1]) if rows else []
    by_subset: dict[str, list[float]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)
    ties: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for row, part in zip(rows, parts, strict=True):
        good, bad = part[: len(row["chosen"])], part[len(row["chosen"]) :]
        if row["subset"].lower() == "ties":
            ties[str(row["id"])] = (good, bad)
        else:
            by_subset[row["subset"]].append(_best_of(good, bad))
            prompts[row["subset"]].append(_key(row["prompt"]))
    subsets = {name: _mean(points) for name, points in sorted(by_subset.items())}
    values_of = {
        name: _accuracy(points, prompts[name]) for name, points in sorted(by_subset.items())
    }
    counts = {name: len(points) for name, points in sorted(by_subset.items())}
    if ties:
        subsets["Ties"] = ties_score(ties)
        values_of["Ties"], counts["Ties"] = _ties_interval(ties), len(ties)
    score = sum(subsets.values()) / len(subsets)
    mean = _weighted(values_of, dict.fromkeys(values_of, 1.0))
    named = {f"subsets / {name}": value for name, value in values_of.items()}
    return {
        "score": score,
        "subsets": subsets,
        "unscored": unscored,
        "intervals": _intervals({"score": mean, **named}),
        "rows": counts,
        "absent": [name for name in SUBSETS_2 if name not in subsets],
    }


def _best_of(good: np.ndarray, bad: np.ndarray) -> float:
    scores = np.concatenate([good, bad])
    if np.isnan(scores).any():
        return 0.0
    top = scores == scores.max()
    return float(top[: len(good)].sum() > 0) / float(top.sum())


def ties_score(prompts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Score of the Ties subset: all right answers should score alike and above every wrong one.

    The weighted sum of 0.3 times the accuracy on each group of prompts (every right answer above
    every wrong one); 0.2 P(the gap to the best wrong answer exceeds the spread of the right ones);
    0.2 P(the smaller of this gap and that of the reference prompt exceeds the spread); and 0.01
    times the mean of tanh(gap / spread - 1).

    Args:
        prompts: "ref:n" (one right answer) and "tied:n" (several) -> scores of the right answers
            and of the wrong answers.
    """
    accurate = {group: [] for group in ("ref", "tied")}
    for key, (good, bad) in prompts.items():
        accurate[key.partition(":")[0]].append(bool(good.min() > bad.max()))
    beyond, hard, clear = [], [], []
    for key, (good, bad) in prompts.items():
        group, _, number = key.partition(":")
        if group != "tied" or f"ref:{number}" not in prompts:
            continue
        spread = float(good.max() - good.min())
        gap = float(good.min() - bad.max())
        reference_good, reference_bad = prompts[f"ref:{number}"]
        reference_gap = float(reference_good.min() - reference_bad.max())
        beyond.append(gap > spread)
        hard.append(min(gap, reference_gap) > spread)
        clear.append(_clearness(min(gap, reference_gap), spread))
    parts = [accurate["tied"], accurate["ref"], beyond, hard, clear]
    means = [_mean(part) if part else 0.0 for part in parts]
    return sum(w * m for w, m in zip((0.3, 0.3, 0.2, 0.2, 0.01), means, strict=True))


def _ties_interval(prompts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Interval:
    """The interval of `ties_score`; a reference prompt and its tied prompt are one unit."""
    keys = list(prompts)

    def score(rows: np.ndarray) -> float:
        return ties_score({keys[row]: prompts[keys[row]] for row in rows})

    return jackknife(score, [key.partition(":")[2] for key in keys])


def _clearness(gap: float, spread: float) -> float:
    """tanh(gap / spread - 1), with its limit at zero spread; 0 for unknown scores."""
    if math.isnan(gap) or math.isnan(spread):
        return 0.0
    return math.tanh(gap / spread - 1) if spread > 0 else float(np.sign(gap))


def rm_bench(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """RM-Bench (2410.16184): substance against style.

    Each row gives 3 x 3 comparisons of chosen style i with rejected style j: ``easy`` if the chosen
    reply has the richer style (i > j), ``normal`` for equal styles, ``hard`` if it has the plainer
    one. Results are averaged per domain (safety: over its two parts), then over domains; the score
    is the mean of the three levels.

    Args:
        reward: The reward under test.
        rows: Rows of ``prompt``, ``domain``, and ``chosen`` and ``rejected`` with three styles each
            (concise, detailed, detailed with Markdown).
    """
    rows = list(rows)
    items = [
        (row["prompt"], r) for row in rows for side in ("chosen", "rejected") for r in row[side]
    ]
    if len(items) != 6 * len(rows):
        raise UserError("RM-Bench rows need three chosen and three rejected replies each")
    values, unscored = _scores(reward, items)
    styles = values.reshape(len(rows), 2, 3)
    wins = styles[:, 0, :, None] > styles[:, 1, None, :]
    i, j = np.indices((3, 3))
    per_row = {"easy": wins[:, i > j], "normal": wins[:, i == j], "hard": wins[:, i < j]}
    parts = np.array([row["domain"] for row in rows])
    by_part = {
        part: {level: float(won[parts == part].mean()) for level, won in per_row.items()}
        for part in sorted(set(parts.tolist()))
    }
    by_domain = {}
    for domain in sorted({part.partition("-")[0] for part in by_part}):
        in_domain = [rates for part, rates in by_part.items() if part.partition("-")[0] == domain]
        by_domain[domain] = {level: _mean([r[level] for r in in_domain]) for level in per_row}
    levels = {level: _mean([rates[level] for rates in by_domain.values()]) for level in per_row}
    score = sum(levels.values()) / 3
    keys = np.array([_key(row["prompt"]) for row in rows])
    intervals = {}
    for level, won in {"score": wins.mean((1, 2)), **per_row}.items():
        # Each level has three of the nine comparisons, so the mean of the levels is that of all.
        rates = won.reshape(len(rows), -1).mean(1)
        per_domain = _over_domains(rates, parts, keys)
        is_score = level == "score"
        named = {(k if is_score else f"{level} / {k}"): v for k, v in per_domain.items()}
        intervals |= {level: _weighted(per_domain, dict.fromkeys(per_domain, 1.0))}
        intervals |= {f"domains / {name}": value for name, value in named.items()}
    domains = {part.partition("-")[0] for part in parts.tolist()}
    return {
        "score": score,
        **levels,
        "domains": by_domain,
        "unscored": unscored,
        "intervals": _intervals(intervals),
        "rows": {part: int((parts == part).sum()) for part in by_part},
        "absent": [name for name in DOMAINS if name not in domains],
    }


def _over_domains(rates: np.ndarray, parts: np.ndarray, keys: np.ndarray) -> dict[str, Interval]:
    """Mean rate over the parts of each domain, with its interval."""
    domains: dict[str, dict[str, Interval]] = defaultdict(dict)
    for part in sorted(set(parts.tolist())):
        value = _accuracy(rates[parts == part], keys[parts == part].tolist())
        domains[part.partition("-")[0]][part] = value
    return {name: _weighted(part, dict.fromkeys(part, 1.0)) for name, part in domains.items()}


def judge_bench(reward: Reward, rows: Iterable[Row]) -> dict[str, Any]:
    """JudgeBench (2410.12784): a row is right if the better reply scores strictly higher.

    Args:
        reward: The reward under test.
        rows: Rows of ``question``, ``response_A``, ``response_B``, ``label`` ("A>B" or "B>A") and
            ``source``.
    """
    rows = list(rows)
    if odd := [row["label"] for row in rows if row["label"] not in ("A>B", "B>A")]:
        raise UserError(f"JudgeBench labels are 'A>B' or 'B>A', got {odd[0]!r}")
    items = [(row["question"], row[f"response_{side}"]) for side in "AB" for row in rows]
    values, unscored = _scores(reward, items)
    gap = values[: len(rows)] - values[len(rows) :]
    signs = np.array([1.0 if row["label"] == "A>B" else -1.0 for row in rows])
    right = gap * signs > 0
    sources: dict[str, list[float]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)
    for row, won in zip(rows, right, strict=True):
        sources[str(row["source"])].append(float(won))
        prompts[str(row["source"])].append(_key(row["question"]))
    rates = {name: sum(wins) / len(wins) for name, wins in sorted(sources.items())}
    parts = {f"sources / {name}": _accuracy(sources[name], prompts[name]) for name in rates}
    accuracy = _accuracy(right.astype(float), [_key(row["question"]) for row in rows])
    return {
        "score": float(right.mean()),
        "sources": rates,
        "unscored": unscored,
        "intervals": _intervals({"score": accuracy, **parts}),
        "rows": {name: len(wins) for name, wins in sorted(sources.items())},
    }


def _key(prompt: str | Conversation) -> str:
    """The prompt as one text; rows with the same prompt are one unit."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _accuracy(values: Sequence[float] | np.ndarray, prompts: Sequence[str]) -> Interval:
    return interval(values, prompts, bounds=(0.0, 1.0), weigh="values")


def _weighted(parts: Mapping[str, Interval], weights: Mapping[str, float]) -> Interval:
    """Weighted mean of independent parts."""
    total = sum(weights.values())
    return weighted_sum([parts[name] for name in weights], [w / total for w in weights.values()])


def _intervals(parts: Mapping[str, Interval]) -> dict[str, dict[str, float | int | None]]:
    """Limits and number of prompts of each part; None where there is no interval."""
    return {
        name: {
            "low": part.low if part.known else None,
            "high": part.high if part.known else None,
            "prompts": part.units,
        }
        for name, part in parts.items()
    }
