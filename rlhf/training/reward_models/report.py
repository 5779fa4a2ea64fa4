"""What a freshly trained reward model is worth, measured by the scorer its checkpoint makes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from rlhf.config.reward import RewardConfig
from rlhf.data.conversation import labelled_conversation
from rlhf.data.splits import prompt_key
from rlhf.evaluation.pairs import write_judgement, write_pairs_evaluation
from rlhf.models.rewards import load_rewards, packed
from rlhf.reward_models import Sidecar, labelled
from rlhf.reward_models.core import Reward
from rlhf.reward_models.learned import LearnedReward
from rlhf.reward_models.pairwise import PairModel
from rlhf.reward_models.process import ProcessReward
from rlhf.reward_models.statistics import gain_interval, share_interval
from rlhf.rollout.chat_format import prompt_of
from rlhf.runs.directory import Run
from rlhf.training.reward_models.encoders import rated_conversation
from rlhf.training.reward_models.kinds import RewardKind, outputs_of
from rlhf.training.stages import Row

log = logging.getLogger(__name__)

# Held-out pairs that the report on a reward model looks at, where no test data are named.
REPORT_PAIRS = 500

Report = dict[str, Any]


def judge(
    kind: RewardKind,
    config: RewardConfig,
    run: Run,
    train_rows: list[Row],
    eval_rows: list[Row],
    *,
    dropped: Mapping[str, int],
    dtype: torch.dtype,
) -> None:
    """Measure the saved model on rows it has not seen, and write the report.

    Args:
        kind: of the reward model.
        config: of its training.
        run: its directory.
        train_rows: what it learned from; the rivals learn from them too.
        eval_rows: what it is judged on.
        dropped: reason -> rows that it could not be judged on.
        dtype: of the weights.
    """
    if kind.report == "pairs" and not config.test_data:
        eval_rows = eval_rows[:REPORT_PAIRS]
    name = str(dtype).removeprefix("torch.")
    if kind.report == "pairs":
        calibrate(run, train_rows, eval_rows, dropped=dropped, dtype=name, seed=config.seed)
        return
    report = REPORTS[kind.report](config, run, train_rows, eval_rows, name)
    summary = {"name": run.directory.name, "env": kind.data, "policy": run.directory.name} | report
    page = labelled.to_markdown(run.directory.name, report)
    write_judgement(run.directory, summary, page)
    for line in page.splitlines()[2:]:
        log.info("%s", line)


def calibrate(
    run: Run,
    train_rows: list[Row],
    eval_rows: list[Row],
    *,
    dropped: Mapping[str, int],
    dtype: str,
    seed: int,
) -> None:
    """Judge the reward model on pairs, and keep the fitted temperature beside it."""
    sidecar = Sidecar.read(run.final)
    assert sidecar is not None
    report = write_pairs_evaluation(
        pair_scorer(run, sidecar, dtype=dtype),
        eval_rows,
        run.directory,
        name=run.directory.name,
        train_rows=train_rows,
        dropped=dropped,
        seed=seed,
    )
    temperature = report["calibration"]["fitted"]["temperature"]
    if temperature is not None:  # None: no better than chance, nothing to fit
        dataclasses.replace(sidecar, temperature=temperature).write(run.final)
    for line in report["verdict"]:
        log.info("%s", line)


def pair_scorer(run: Run, sidecar: Sidecar, *, dtype: str) -> Reward:
    """The scorer of a checkpoint trained on pairs, turned so that higher is better."""
    if sidecar.kind == "learned":
        return packed(LearnedReward.load(run.final, dtype=dtype))
    reward = load_rewards({"kind": sidecar.kind, "path": str(run.final)})
    return reward * -1.0 if sidecar.kind == "cost" else reward


def _classes(
    config: RewardConfig, run: Run, train_rows: list[Row], rows: list[Row], dtype: str
) -> Report:
    """Classes against TF-IDF and logistic regression; the score of two classes is a log-odds."""
    names = config.labels or ["0", "1"]
    logits = _logits(run, rows, dtype)
    if len(names) == 2:
        odds = logits.mean(1)  # of the heads, where there are several
        logits = np.stack([np.zeros_like(odds), odds], 1)
    labels = np.array([int(row["label"]) for row in rows])
    words = labelled.words_classifier(
        [_text(row) for row in train_rows],
        [int(row["label"]) for row in train_rows],
        [_text(row) for row in rows],
        classes=len(names),
    )
    common = np.bincount([int(row["label"]) for row in train_rows], minlength=len(names))
    rivals = {"TF-IDF": words, "commonest class": np.tile(common.astype(float), (len(rows), 1))}
    return labelled.classification_report(logits, labels, rivals=rivals, groups=_units(rows))


def _columns(
    config: RewardConfig, run: Run, train_rows: list[Row], rows: list[Row], dtype: str, what: str
) -> Report:
    """One column after the other, against the words; the report's metrics are named after them."""
    logits = _logits(run, rows, dtype)
    units = len(set(_units(rows)))
    report: Report = {
        "rows": len(rows),
        "units": units,
        "metrics": {},
        "baselines": {"TF-IDF": {}},
        "gains": {},
    }
    report["gains"]["TF-IDF"] = {}
    for k, column in enumerate(outputs_of(config)):
        key = column if config.labels else "label"
        there = [i for i, row in enumerate(rows) if row[key] is not None]
        known = [row for row in train_rows if row[key] is not None]
        truth = np.array([rows[i][key] for i in there], dtype=float)
        texts = [_text(row) for row in known], [_text(rows[i]) for i in there]
        units = _units([rows[i] for i in there])
        if what == "flags":
            found = np.stack([np.zeros(len(there)), logits[there, k]], 1)
            words = labelled.words_classifier(
                texts[0], [int(row[key]) for row in known], texts[1], classes=2
            )
            part = labelled.classification_report(
                found, truth.astype(int), rivals={"TF-IDF": words}, groups=units
            )
        else:
            ratings = [float(row[key]) for row in known]
            words = labelled.words_rater(texts[0], ratings, texts[1])
            part = labelled.rating_report(
                logits[there, k], truth, rivals={"TF-IDF": words}, groups=units
            )
        prefix = f"{key}/" if len(outputs_of(config)) > 1 else ""
        report["metrics"] |= _named(part["metrics"], prefix)
        report["baselines"]["TF-IDF"] |= _named(part["baselines"]["TF-IDF"], prefix)
        report["gains"]["TF-IDF"] |= _named(part["gains"]["TF-IDF"], prefix)
    return report


def _flags(config: RewardConfig, run: Run, train: list[Row], rows: list[Row], dtype: str) -> Report:
    return _columns(config, run, train, rows, dtype, "flags")


def _ratings(
    config: RewardConfig, run: Run, train: list[Row], rows: list[Row], dtype: str
) -> Report:
    return _columns(config, run, train, rows, dtype, "ratings")


def _candidates(
    config: RewardConfig, run: Run, train: list[Row], rows: list[Row], dtype: str
) -> Report:
    """Share of the prompts whose best reply scores highest, beside guessing and the longest."""
    reward = packed(LearnedReward.load(run.final, dtype=dtype))
    top, longest, chance = [], [], []
    for row in rows:
        best = row.get("best", 0)
        scores = reward([[*prompt_of(row), *reply] for reply in row["replies"]])
        known = [-np.inf if score is None else score for score in scores]
        sizes = [sum(len(m["content"]) for m in reply) for reply in row["replies"]]
        top.append(float(int(np.argmax(known)) == best))
        longest.append(float(int(np.argmax(sizes)) == best))
        chance.append(1 / len(row["replies"]))
    groups = [prompt_key(row) for row in rows]
    return _shares(groups, top, {"longest": longest, "chance": chance})


def _compare(
    config: RewardConfig, run: Run, train: list[Row], rows: list[Row], dtype: str
) -> Report:
    """Accuracy of the comparison, how often both orders agree, beside "longer wins"."""
    model = packed(PairModel.load(run.final, dtype=dtype))
    chosen, rejected = (
        ["\n\n".join(m["content"] for m in row[side]) for row in rows]
        for side in ("chosen", "rejected")
    )
    odds, agree = model.compare([prompt_of(row) for row in rows], chosen, rejected)
    right = [(np.sign(value) + 1) / 2 for value in odds]
    longer = [(np.sign(len(a) - len(b)) + 1) / 2 for a, b in zip(chosen, rejected, strict=True)]
    groups = [prompt_key(row) for row in rows]
    report = _shares(groups, right, {"longer wins": longer})
    report["metrics"]["order_agreement"] = _mean(agree, groups)
    return report


def _steps(config: RewardConfig, run: Run, train: list[Row], rows: list[Row], dtype: str) -> Report:
    """Share of the steps that are judged rightly, beside calling every step the commoner class."""
    reward = ProcessReward.load(run.final, dtype=dtype)
    right, common, groups = [], [], []
    seen = [bool(label) for row in train for label in row["labels"] if label is not None]
    mostly = bool(np.mean(seen) >= 0.5)
    for row in rows:
        reply = "".join(step + config.separator for step in row["steps"])
        scores = reward.step_scores([*prompt_of(row), {"role": "assistant", "content": reply}])
        for score, label in zip(scores, row["labels"], strict=True):
            if label is not None:
                right.append(float((score > 0.5) == bool(label)))
                common.append(float(mostly == bool(label)))
                groups.append(prompt_key(row))
    return _shares(groups, right, {"commonest label": common})


def _shares(groups: list[str], right: list[float], rivals: dict[str, list[float]]) -> Report:
    """Accuracy, that of each rival, and the paired gain; prompts are the units."""
    gains = {
        name: {"accuracy": labelled.plain(gain_interval(np.subtract(right, theirs), groups))}
        for name, theirs in rivals.items()
    }
    return {
        "rows": len(right),
        "units": len(set(groups)),
        "metrics": {"accuracy": _mean(right, groups)},
        "baselines": {n: {"accuracy": _mean(v, groups)} for n, v in rivals.items()},
        "gains": gains,
    }


def _mean(values: Any, groups: list[str]) -> labelled.Estimate:
    return labelled.plain(share_interval(values, groups))


def _units(rows: list[Row]) -> list[str]:
    """The independent unit of each row: its prompt, or the text itself where there is none."""
    return [prompt_key(row) if row.get("prompt") else _text(row) for row in rows]


def _named(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _logits(run: Run, rows: list[Row], dtype: str) -> np.ndarray:
    """Raw outputs [N, K] of the saved model."""
    reward = packed(LearnedReward.load(run.final, dtype=dtype, attributes="all"))
    ids = [reward.encode(rated_conversation(row)) for row in rows]
    return reward.score_ids(ids).numpy()


def _text(row: Row) -> str:
    return labelled_conversation(row)[-1]["content"]


REPORTS: dict[str, Callable[..., Report]] = {
    "classes": _classes,
    "flags": _flags,
    "ratings": _ratings,
    "candidates": _candidates,
    "compare": _compare,
    "steps": _steps,
}
